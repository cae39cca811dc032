"""`Turns`: many devices are given work a few at a time, and none that is slow to take it holds up the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

AT_ONCE: Final = 16
LONGEST_S: Final = 0.25


class Turns:
    """At most ``at_once`` at the same time, of which those that take over ``longest_s`` seconds do not count.

    What comes meanwhile, such as the report of a device that is done already, is heard in between. For one event loop.
    """

    def __init__(self, at_once: int = AT_ONCE, longest_s: float = LONGEST_S) -> None:
        self._free = asyncio.Semaphore(at_once)
        self._longest_s = longest_s

    @asynccontextmanager
    async def one(self) -> AsyncIterator[Callable[[], None]]:
        """Wait for a turn, and have it meanwhile; what is returned ends it before."""
        await self._free.acquire()
        mine = [self._free]

        def end() -> None:
            if mine:
                mine.pop().release()

        patience = asyncio.get_running_loop().call_later(self._longest_s, end)
        try:
            yield end
        finally:
            patience.cancel()
            end()
