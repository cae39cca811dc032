"""`within`: await something for so long at most."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` returns. After ``seconds`` it is cancelled, and `asyncio.TimeoutError` raised.

    As `asyncio.wait_for`, which before Python 3.12 loses a cancellation, such as Ctrl-C's, that comes as ``work`` ends.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task], timeout=seconds)
        if task.done():
            return task.result()
        raise asyncio.TimeoutError
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # where nobody else asks for it any more
