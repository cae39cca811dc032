"""Tell where a socket was opened that nobody closed: the garbage collector finds it in whatever test comes later."""

from __future__ import annotations

import socket
import traceback
import warnings
from typing import Any, Final

FRAMES: Final = 30
"""Number of calls that are told."""

_opened: dict[int, traceback.StackSummary] = {}
_init = socket.socket.__init__


def watch_sockets() -> None:
    """From now on, warn of unclosed sockets with the calls that opened them, in the place of Python's own warning."""
    socket.socket.__init__ = _remember  # type: ignore[method-assign]
    socket.socket.__del__ = _warn_if_open  # type: ignore[attr-defined]


def _remember(self: socket.socket, *args: Any, **options: Any) -> None:
    _init(self, *args, **options)
    calls = traceback.walk_stack(None)
    _opened[id(self)] = traceback.StackSummary.extract(calls, limit=FRAMES, lookup_lines=False)


def _warn_if_open(self: socket.socket) -> None:
    calls = _opened.pop(id(self), None)
    if self.fileno() == -1:
        return
    place = "".join(reversed(calls.format())) if calls is not None else ""
    try:
        warnings.warn(f"unclosed {self!r}, opened at:\n{place}", ResourceWarning, source=self, stacklevel=1)
    finally:
        socket.socket.close(self)
