"""Python's collection of garbage, when nobody waits: going through a big fleet's objects takes 0.2 s and more."""

from __future__ import annotations

import gc

from fedbpt.runs import Event, RoundClosed, RunStarted

NEVER = 2**30


def collect_between_rounds(event: Event) -> None:
    """A `fedbpt.runs.EventCallback`, for a process that does nothing else: from a run's start on, all of its objects
    are gone through when a round has closed, and only then; young ones as always.
    """
    match event:
        case RunStarted():
            gc.freeze()  # what is loaded stays
            young, middle, _ = gc.get_threshold()
            gc.set_threshold(young, middle, NEVER)
        case RoundClosed():
            gc.collect()
