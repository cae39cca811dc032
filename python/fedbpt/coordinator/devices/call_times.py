"""`CallTimes`: when a waiting device is to call again, so that a large fleet costs as much as the devices of a round.

Pace steering (Bonawitz et al., "Towards Federated Learning at Scale: System Design", 2019, arXiv 1902.01046, section
2.3). A round draws `DRAWN` devices for each one that it asks, and the draws of later rounds are known (`Draw`). So a
device is told to call within the first half of the round before its own, at a uniformly random time, and from then on
its poll is held until its round opens: the round finds its devices waiting.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from fedbpt.protocol.polling import MAX_PAUSE_S, call_s

DRAWN: Final = 3
"""Devices that are drawn, and wait, for each one that a round asks."""

HELD_POLLS: Final = 100
"""Runs of up to this many devices are not paced: they all wait."""

MIN_PAUSE_S: Final = 5.0
"""A device that would be told to call sooner has its poll held: that costs no more."""

FIRST_ROUND_S: Final = 20.0
"""Assumed duration of a round before the first has closed. Devices that call too early cost less than late ones."""

EARLY: Final = 0.9
"""Part of the expected time after which a device is to call, as rounds may become faster."""

MEMORY: Final = 9
"""Last rounds, whose median duration is that of the next ones."""

MAX_AHEAD: Final = 64
"""Rounds that are looked ahead for a device's next draw."""


class _Open(NamedTuple):
    """The open round, and whether a later one draws a device: ``draws(rounds from now, device)``."""

    at: float
    draws: Callable[[int, str], bool]


class CallTimes:
    """The pacer of one run (`fedbpt.coordinator.clients.mailbox.Pacer`).

    Args:
        devices: names of the run's devices that call in.
        bound_s: returns the longest pause, seconds: a round of all devices has to reach them before its deadline.
        is_short: whether the open round has asked fewer devices than it is to.
        n_calling: returns the number of devices that call the same coordinator, with those of other runs; None: the
            number of ``devices``.
        chance, clock: replaced in tests.
    """

    def __init__(
        self,
        devices: frozenset[str],
        bound_s: Callable[[], float],
        is_short: Callable[[], bool] = lambda: False,
        chance: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        n_calling: Callable[[], int] | None = None,
    ) -> None:
        self._devices = devices
        self._bound_s = bound_s
        self._is_short = is_short
        self._chance = chance or random.Random()
        self._clock = clock
        self._n_calling = n_calling or (lambda: len(devices))
        self._took: deque[float] = deque(maxlen=MEMORY)
        self._open: _Open | None = None

    def opened(self, draws: Callable[[int, str], bool]) -> None:
        """A round has opened. ``draws(k, device)``: whether the k-th round after it draws ``device``; 0: itself."""
        self._note_duration()
        self._open = _Open(self._clock(), draws)

    def ask_all(self) -> None:
        """The open round, if any, has closed, and until the next one opens all devices may be asked."""
        self._note_duration()
        self._open = None

    def _note_duration(self) -> None:
        if self._open is not None:
            self._took.append(self._clock() - self._open.at)

    def __call__(self, device: str) -> float:
        """Seconds after which ``device`` is to call again; 0: its poll is held; infinite: the run does not mind."""
        if device not in self._devices:
            return math.inf
        current = self._open
        bound_s = min(self._bound_s(), MAX_PAUSE_S)
        if current is None or len(self._devices) <= HELD_POLLS:
            usual_s = call_s(self._n_calling())
            return self._chance.uniform(0.75, 1.0) * min(usual_s, bound_s) if usual_s else math.inf
        if self._is_short() and current.draws(0, device):
            return 0.0
        round_s = statistics.median(self._took) if self._took else FIRST_ROUND_S
        looked = min(math.ceil(bound_s / max(round_s, 1e-3)) + 1, MAX_AHEAD)
        ahead = next((k for k in range(1, looked + 1) if current.draws(k, device)), looked + 1)
        if ahead == 1:
            return 0.0
        begun_s = min(self._clock() - current.at, round_s)
        pause_s = EARLY * ((ahead - 1 + self._chance.uniform(0.0, 0.5)) * round_s - begun_s)
        if pause_s > bound_s:
            pause_s = self._chance.uniform(0.75, 1.0) * bound_s
        return pause_s if pause_s >= MIN_PAUSE_S else 0.0
