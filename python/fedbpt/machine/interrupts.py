"""Ctrl-C during a long call inside ``asyncio.run``.

There SIGINT cancels the main task (Python 3.11 and newer) or calls what the loop was given, once that loop turns; a
plain call that is under way keeps it from turning, and so would hear of no Ctrl-C until its end.
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
    """Inside, and as a decorator around a call: Ctrl-C raises KeyboardInterrupt also within a running event loop.

    Handlers of the user's own stay in force.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not (_in_loop_of_main_thread() and _is_a_loops(handler)):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, Ctrl-C waits for the end: for code of others that takes KeyboardInterrupt for any other error."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if came:
        handler(*came[0])


def _in_loop_of_main_thread() -> bool:
    if threading.current_thread() is not threading.main_thread():
        return False
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _is_a_loops(handler: object) -> bool:
    function = getattr(handler, "func", handler)  # asyncio.run's is a functools.partial
    return str(getattr(function, "__module__", "")).partition(".")[0] in ("asyncio", "uvloop")
