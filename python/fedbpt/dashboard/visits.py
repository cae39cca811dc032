"""`Visits`: whether anybody looks at the dashboard."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

AWAY_S: Final = 5.0
"""How long nobody may be there without being gone: between two pages, at a reload, on a phone that changes networks."""


class Visits:
    """Who opens pages. From any thread.

    Args:
        n_pages: how many pages are open now.
    """

    def __init__(self, n_pages: Callable[[], int]) -> None:
        self._n_pages = n_pages
        self._seen_at = -math.inf

    def came(self) -> None:
        """A page was asked for."""
        self._seen_at = time.monotonic()

    def are_on(self) -> bool:
        """Whether a page is open, or was asked for or open within `AWAY_S`."""
        if self._n_pages():
            self.came()
        return time.monotonic() - self._seen_at < AWAY_S
