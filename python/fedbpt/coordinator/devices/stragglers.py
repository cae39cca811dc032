"""`Pace` and `TextPace`: how long each device usually takes for a kind of round, and for a text.

A device that takes much longer than usual is asleep or busy: once enough others have reported, a round does not wait
for it until its deadline.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from typing import Final

MEMORY: Final = 9
"""Last rounds of a kind, whose median is the usual time."""

ENOUGH: Final = 3
"""Fewest rounds for a usual time."""

SLACK_S: Final = 2.0
"""Added to the limit of every device: networks and garbage collectors pause."""


class Pace:
    """``stragglers``: multiple of its usual time after which a device is late; 0: no limit."""

    def __init__(self, stragglers: float) -> None:
        self._stragglers = stragglers
        self._seconds: dict[tuple[str, str], deque[float]] = defaultdict(lambda: deque(maxlen=MEMORY))

    def took(self, device: str, kind: str, seconds: float) -> None:
        """Record that ``device`` reported on a round of ``kind`` after ``seconds``."""
        self._seconds[device, kind].append(seconds)

    def limit(self, device: str, kind: str) -> float:
        """Seconds to wait for ``device`` in a round of ``kind``; infinite without a usual time."""
        seconds = self._seconds[device, kind]
        if not self._stragglers or len(seconds) < ENOUGH:
            return float("inf")
        return self._stragglers * statistics.median(seconds) + SLACK_S


class TextPace:
    """Seconds that each device takes for a text, by its reports; sizes mini-batches so that all take equally long."""

    def __init__(self) -> None:
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=MEMORY))

    def took(self, device: str, seconds: float, n_texts: int) -> None:
        self._seconds[device].append(seconds / n_texts)

    def batch_size(self, device: str, usual: int) -> int:
        """Texts for ``device`` if a device of median speed gets ``usual``: from 1 to 4 times ``usual``."""
        speeds = {name: statistics.median(seconds) for name, seconds in self._seconds.items()}
        if not speeds.get(device):
            return usual
        fair = usual * statistics.median(speeds.values()) / speeds[device]
        return max(1, round(min(fair, 4 * usual)))
