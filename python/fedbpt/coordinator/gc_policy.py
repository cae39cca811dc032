"""Python's collection of garbage, when nobody waits: going through a big fleet's objects takes 0.2 s and more."""

from __future__ import annotations

import gc

from fedbpt.runs.events import Event, RoundClosed, RunFinished, RunStarted

NORMAL = gc.get_threshold()
NEVER = 2**30


def collect_between_rounds(event: Event) -> None:
    """A `fedbpt.runs.events.EventCallback`, for a process that coordinates one run: from its start to its end, all
    objects are gone through when a round has closed, and only then; young ones as always.
    """
    match event:
        case RunStarted():
            gc.freeze()  # what is loaded stays
            gc.set_threshold(*NORMAL[:2], NEVER)
        case RoundClosed():
            gc.collect()
        case RunFinished():
            gc.set_threshold(*NORMAL)  # its dashboard may be open for days
