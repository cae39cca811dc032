"""`RateLimit`: a token bucket for each key, such as a device's name or an address."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

MAX_KEYS: Final = 10_000
"""Buckets that are kept; the one unused for longest is dropped, and its key begins anew."""


class RateLimit:
    """Allows ``burst`` calls at once and ``per_second`` in the long run, for each key. For one thread."""

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._burst, self._clock = per_second, burst, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # key: calls left, as of when

    def take(self, key: str) -> float:
        """0.0 where the call is allowed, else the seconds after which the next one will be."""
        now = self._clock()
        left, then = self._buckets.pop(key, (float(self._burst), now))
        left = min(left + (now - then) * self._per_second, self._burst)
        wait_s = 0.0 if left >= 1 else (1 - left) / self._per_second
        self._buckets[key] = (left if wait_s else left - 1, now)
        if len(self._buckets) > MAX_KEYS:
            self._buckets.popitem(last=False)
        return wait_s
