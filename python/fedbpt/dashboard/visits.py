"""`Visits`: tracks whether anybody looks at the dashboard."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

AWAY_S: Final = 5.0
"""How long to tolerate that no page is open, in seconds: at a reload, or when a phone changes networks."""


class Visits:
    """Open and recently opened pages. Thread-safe.

    Args:
        n_pages: returns the number of open pages.
    """

    def __init__(self, n_pages: Callable[[], int]) -> None:
        self._n_pages = n_pages
        self._seen_at = -math.inf

    def record(self) -> None:
        """Record that a page was requested."""
        self._seen_at = time.monotonic()

    def are_recent(self) -> bool:
        """Whether a page is open, or was requested or open within `AWAY_S`."""
        if self._n_pages():
            self.record()
        return time.monotonic() - self._seen_at < AWAY_S
