"""`DrawCheck`: whether a device was drawn for the rounds that it is asked in (`fedbpt.protocol.draws`)."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Final, NamedTuple

from fedbpt.protocol.draws import Draw
from fedbpt.protocol.rounds import RoundPlan

log = logging.getLogger(__name__)

MAX_RUNS: Final = 16
"""Runs that are remembered."""


class Known(NamedTuple):
    """What fixes a run's draws of this device, and the widest share that it was drawn from."""

    seed: int
    device: str
    share: float


class DrawCheck:
    """The draws of one device. A wider share, another seed or another name is logged: with these, a coordinator could
    ask one device more often than others.

    Attributes:
        known: by run.
    """

    def __init__(self) -> None:
        self.known: OrderedDict[str, Known] = OrderedDict()

    def problem(self, plan: RoundPlan, share: float) -> str:
        """Why ``plan``, of a round that draws ``share`` of all devices, is not for its device; empty: it is."""
        value = Draw(plan.run, plan.seed, plan.round).value(plan.device)
        if value >= share:
            return (
                f"round {plan.round} of run {plan.run!r} draws devices below {share:.4g}, and {plan.device!r} is at "
                f"{value:.4g}: ask it in a round that draws it"
            )
        known = self.known.get(plan.run)
        said = Known(plan.seed, plan.device, share)
        if known is None:
            log.info("run %r asks this device in at most %.3g %% of its rounds", plan.run, 100 * share)
        elif known[:2] != said[:2]:
            log.warning("run %r has changed its seed or this device's name, and so which rounds draw it", plan.run)
        elif share > known.share:
            log.warning("run %r now asks this device in up to %.3g %% of its rounds", plan.run, 100 * share)
        else:
            return ""
        self.known[plan.run] = said
        if len(self.known) > MAX_RUNS:
            self.known.popitem(last=False)
        return ""
