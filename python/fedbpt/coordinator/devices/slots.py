"""`Slots`: limit how many devices are given work at once, without waiting for slow ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

AT_ONCE: Final = 16
MAX_HOLD_S: Final = 0.25


class Slots:
    """A semaphore of ``at_once`` slots, each of which is released after at most ``max_hold_s`` seconds.

    Between two acquisitions the event loop handles what has arrived, such as reports. For one event loop.
    """

    def __init__(self, at_once: int = AT_ONCE, max_hold_s: float = MAX_HOLD_S) -> None:
        self._free = asyncio.Semaphore(at_once)
        self._max_hold_s = max_hold_s

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[Callable[[], None]]:
        """Acquire a slot; the yielded callable releases it early."""
        await self._free.acquire()
        is_held = True

        def release() -> None:
            nonlocal is_held
            if is_held:
                is_held = False
                self._free.release()

        timer = asyncio.get_running_loop().call_later(self._max_hold_s, release)
        try:
            yield release
        finally:
            timer.cancel()
            release()
