"""`RateLimit`: a token bucket per key, such as a device's name or an address."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

MAX_KEYS: Final = 10_000
"""Maximum number of buckets; the least recently used is dropped."""


class RateLimit:
    """Allows bursts of ``burst`` calls and ``per_second`` calls on average, per key. Not thread-safe."""

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # by key: calls left, and at what time

    def take(self, key: str) -> float:
        """Count a call. Returns 0.0 if it is allowed, else the seconds until the next one will be."""
        now = self._clock()
        left, then = self._buckets.pop(key, (float(self._burst), now))
        left = min(left + (now - then) * self._per_second, self._burst)
        wait_s = 0.0 if left >= 1 else (1 - left) / self._per_second
        self._buckets[key] = (left if wait_s else left - 1, now)
        if len(self._buckets) > MAX_KEYS:
            self._buckets.popitem(last=False)
        return wait_s
