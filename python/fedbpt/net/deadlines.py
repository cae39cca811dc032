"""`within`: a timeout for coroutines."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``. After ``seconds`` it is cancelled and `asyncio.TimeoutError` is raised.

    Like `asyncio.wait_for`, which before Python 3.12 may lose a cancellation (Ctrl-C) that arrives as ``work`` ends.
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
            task.exception()  # marks it as retrieved
