"""`Pace`: how long devices usually take for a kind of round, and for a text.

A device that takes much longer than it usually does sleeps, or is busy with something else: once enough others have
reported, a round need not wait for it until its deadline.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from typing import Final

MEMORY: Final = 9
"""Rounds of a kind that the usual time is the median of."""

ENOUGH: Final = 3
"""Rounds before there is a usual time."""

SLACK_S: Final = 2.0
"""What any device may take beyond its multiple: networks and garbage collectors pause."""


class Pace:
    """``stragglers``: so many times its usual time is a device waited for; 0: however long it takes."""

    def __init__(self, stragglers: float) -> None:
        self._stragglers = stragglers
        self._seconds: dict[tuple[str, str], deque[float]] = defaultdict(lambda: deque(maxlen=MEMORY))

    def took(self, device: str, kind: str, seconds: float) -> None:
        """``device`` reported on a round of ``kind`` after ``seconds``."""
        self._seconds[device, kind].append(seconds)

    def limit(self, device: str, kind: str) -> float:
        """How many seconds ``device`` is waited for in a round of ``kind``; infinite while that is not known."""
        seconds = self._seconds[device, kind]
        if not self._stragglers or len(seconds) < ENOUGH:
            return float("inf")
        return self._stragglers * statistics.median(seconds) + SLACK_S


class TextPace:
    """Seconds that each device takes for a text, by its own reports; sizes mini-batches so that all end together."""

    def __init__(self) -> None:
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=MEMORY))

    def took(self, device: str, seconds: float, n_texts: int) -> None:
        self._seconds[device].append(seconds / n_texts)

    def batch_size(self, device: str, usual: int) -> int:
        """Texts for ``device`` where a device of median speed gets ``usual``: 1 to four times as many."""
        speeds = {name: statistics.median(seconds) for name, seconds in self._seconds.items()}
        if not speeds.get(device):
            return usual
        fair = usual * statistics.median(speeds.values()) / speeds[device]
        return max(1, round(min(fair, 4 * usual)))
