"""Full garbage collections between rounds only, and seldom: with thousands of devices, one takes 0.2 s to 2 s.

In that time no report is acknowledged, so collections may take up `MAX_SHARE` of all time, well below the 1 % that
would show in the 99th percentile.
"""

from __future__ import annotations

import gc
import time

from fedbpt.runs.events import Event, RoundClosed, RunFinished, RunStarted

NORMAL = gc.get_threshold()
NEVER = 2**30

MAX_SHARE = 0.005
"""Largest share of the time that full collections take."""

_next_at = 0.0  # monotonic


def collect_between_rounds(event: Event) -> None:
    """A `fedbpt.runs.events.EventCallback` for a process that coordinates one run.

    During the run, the oldest generation is collected only when a round has closed, and not before it is due again;
    younger ones as usual.
    """
    global _next_at
    match event:
        case RunStarted():
            _next_at = 0.0
            gc.freeze()  # modules stay loaded: do not traverse them
            gc.set_threshold(*NORMAL[:2], NEVER)
        case RoundClosed():
            began = time.monotonic()
            if began >= _next_at:
                gc.collect()
                ended = time.monotonic()
                _next_at = ended + (ended - began) / MAX_SHARE
        case RunFinished():
            gc.set_threshold(*NORMAL)  # the process may serve its dashboard for days


def collect_normally() -> None:
    """End what `collect_between_rounds` began, in a process that coordinates other runs later.

    Call when nothing holds the run any more: it has reference cycles, and the next run would freeze them.
    """
    gc.set_threshold(*NORMAL)
    gc.unfreeze()
    gc.collect()
