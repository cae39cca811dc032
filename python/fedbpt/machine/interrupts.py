"""Ctrl-C during a blocking call inside ``asyncio.run``.

There, SIGINT cancels the main task (Python 3.11 and newer) or calls the loop's own handler, but only when the event
loop runs: a blocking call would not be interrupted before its end.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible() -> Iterator[None]:
    """Context manager and decorator: Ctrl-C raises KeyboardInterrupt even inside a running event loop.

    A handler that the caller has installed stays in force.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not (_in_loop_of_main_thread() and _is_loop_handler(handler)):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Defer Ctrl-C to the end of the context, for library code that handles KeyboardInterrupt like any other error."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if received:
        handler(*received[0])


def _in_loop_of_main_thread() -> bool:
    if threading.current_thread() is not threading.main_thread():
        return False
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _is_loop_handler(handler: object) -> bool:
    function = getattr(handler, "func", handler)  # asyncio.run installs a functools.partial
    return str(getattr(function, "__module__", "")).partition(".")[0] in ("asyncio", "uvloop")
