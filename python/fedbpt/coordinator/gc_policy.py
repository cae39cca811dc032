"""Full garbage collections between rounds only: with a large fleet, one takes 0.2 s or more."""

from __future__ import annotations

import gc

from fedbpt.runs.events import Event, RoundClosed, RunFinished, RunStarted

NORMAL = gc.get_threshold()
NEVER = 2**30


def collect_between_rounds(event: Event) -> None:
    """A `fedbpt.runs.events.EventCallback` for a process that coordinates one run.

    During the run, the oldest generation is collected only when a round has closed; younger ones as usual.
    """
    match event:
        case RunStarted():
            gc.freeze()  # modules stay loaded: do not traverse them
            gc.set_threshold(*NORMAL[:2], NEVER)
        case RoundClosed():
            gc.collect()
        case RunFinished():
            gc.set_threshold(*NORMAL)  # the process may serve its dashboard for days


def collect_normally() -> None:
    """End what `collect_between_rounds` began, in a process that coordinates other runs later.

    Call when nothing holds the run any more: it has reference cycles, and the next run would freeze them.
    """
    gc.set_threshold(*NORMAL)
    gc.unfreeze()
    gc.collect()
