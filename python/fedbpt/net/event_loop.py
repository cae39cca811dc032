"""Running coroutines from synchronous code, even inside a running event loop, as in a notebook."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from fedbpt.machine.interrupts import interruptible

T = TypeVar("T")


@interruptible()
def run_to_end(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run ``main`` and return its result, in a new thread if an event loop is running here. Ctrl-C cancels it."""
    return _run_in_thread(main) if _in_loop() else asyncio.run(main())


def _in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _run_in_thread(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any] | None]] = []
    stopped = threading.Event()

    async def wrapped() -> T:
        running.append((asyncio.get_running_loop(), asyncio.current_task()))
        if stopped.is_set():  # interrupted before there was a task to cancel
            raise asyncio.CancelledError
        return await main()

    with concurrent.futures.ThreadPoolExecutor(1, "fedbpt-federation") as pool:
        try:
            return pool.submit(lambda: asyncio.run(wrapped())).result()
        except KeyboardInterrupt:
            stopped.set()
            for loop, task in running:
                if task is not None:
                    with suppress(RuntimeError):  # it has just finished, and its loop is closed
                        loop.call_soon_threadsafe(task.cancel)
            raise  # after the thread has ended
