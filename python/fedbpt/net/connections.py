"""`Listener`: a listening socket whose connections are bounded in number, and in how long they may be idle.

asyncio keeps a connection that says nothing for ever. Once file descriptors have run out it logs a traceback for each
connection that it cannot accept, thousands a second. So idle connections are closed: those that do not say what they
want in time, and while there are too many, those that have been idle longest. Connections at work are left alone.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
import time
from contextlib import suppress
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol

if sys.platform != "win32":
    import resource

log = logging.getLogger(__name__)

HEADERS_S: Final = 15.0
"""How long a new connection may take to say what it wants, a TLS handshake included."""

KEPT_S: Final = 75.0
"""How long a connection may be idle after a request. Our callers let go first (`fedbpt.net.server.IDLE_S`)."""

RESERVED: Final = 64
"""File descriptors left to the rest of the process, and a quarter of all where that is more."""

QUIET_S: Final = 60.0
"""Between two warnings of the same thing."""

_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def most_connections() -> int:
    """As many as a server may have, by the process's limit of open files."""
    if sys.platform == "win32":
        return 512
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        soft = 1 << 16
    return int(max(soft - max(RESERVED, soft // 4), 8))


class Connection(socket.socket):
    """An accepted connection. ``since``: when it became idle, None while it is at work."""

    listener: Listener
    since: float | None
    has_asked = False
    """Whether a request was answered."""
    is_shed = False

    def shed(self) -> None:
        """Close it both ways: its transport then sees the end, and lets go of it."""
        self.is_shed = True
        with suppress(OSError):  # the other side was faster
            self.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """See `socket.socket.close`."""
        self.listener.forget(self)
        super().close()


class Listener(socket.socket):
    """A TCP socket for `asyncio.loop.create_server`. Use its connections from one event loop.

    ``most``: connections at once; None: by the process's limit of open files.
    """

    def __init__(self, family: int, kind: int, most: int | None = None) -> None:
        super().__init__(family, kind)
        self.most = most_connections() if most is None else most
        self._open: dict[int, Connection] = {}
        self._spare = _spare()
        self._warned = -QUIET_S

    def accept(self) -> tuple[socket.socket, Any]:
        """See `socket.socket.accept`; BlockingIOError also where the event loop must close connections first."""
        if len(self._open) > self.most + RESERVED // 2:
            raise BlockingIOError  # many were shed in this turn of the loop, which has not closed them yet
        try:
            plain, address = super().accept()
        except OSError as error:
            if error.errno in _EXHAUSTED:
                self._turn_away()
                raise BlockingIOError from error
            raise
        connection = Connection(plain.family, plain.type, plain.proto, plain.detach())
        connection.listener, connection.since = self, time.monotonic()
        self._open[connection.fileno()] = connection
        if len(self._open) > self.most and not self._shed_one(but=connection):
            connection.close()  # all others are at work
            raise BlockingIOError
        return connection, address

    def forget(self, connection: Connection) -> None:
        """It is being closed."""
        if self._open.get(connection.fileno()) is connection:
            del self._open[connection.fileno()]

    def of(self, fileno: int) -> Connection | None:
        """The open connection with this descriptor."""
        return self._open.get(fileno)

    def shed_idle(self) -> None:
        """Close the connections that have been idle for too long."""
        now = time.monotonic()
        for connection in list(self._open.values()):
            limit = KEPT_S if connection.has_asked else HEADERS_S
            if connection.since is not None and now - connection.since > limit and not connection.is_shed:
                connection.shed()

    def close(self) -> None:
        """See `socket.socket.close`."""
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
        super().close()

    def _shed_one(self, but: Connection) -> bool:
        """Close the connection that has been idle longest, first of those that have not asked anything yet."""
        idle = [
            (each.has_asked, each.since, fileno)
            for fileno, each in self._open.items()
            if each.since is not None and each is not but and not each.is_shed
        ]
        self._warn(f"{len(self._open)} connections are open, as many as can be: idle ones are closed")
        if not idle:
            return False
        self._open[min(idle)[2]].shed()
        return True

    def _turn_away(self) -> None:
        """No descriptor is left for the connection that waits: use the spare one to accept and close it."""
        self._warn("no file descriptor is left for another connection: idle ones are closed, new ones turned away")
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
            with suppress(OSError):
                super().accept()[0].close()
            self._spare = _spare()
        idle = [each for each in self._open.values() if each.since is not None and not each.is_shed]
        for connection in idle[: max(len(idle) // 4, 1)]:
            connection.shed()
        if self._spare is None:
            self._spare = _spare()

    def _warn(self, text: str) -> None:
        if time.monotonic() - self._warned > QUIET_S:
            log.warning("port %d: %s", self.getsockname()[1], text)
        self._warned = time.monotonic()


class Http(H11Protocol):
    """uvicorn's protocol, which tells the connection when it is at work."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._mark()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._mark()

    def handle_websocket_upgrade(self, event: Any) -> None:
        if (connection := self._connection()) is not None:
            connection.since = None  # for as long as it lasts; its own pings find out whether somebody is there
        super().handle_websocket_upgrade(event)

    def _mark(self) -> None:
        connection = self._connection()
        if connection is None or self.transport.get_protocol() is not self:
            return
        if self.cycle is not None and not self.cycle.response_complete:
            connection.since = None
        elif connection.since is None:
            connection.since, connection.has_asked = time.monotonic(), True

    def _connection(self) -> Connection | None:
        found = self.transport.get_extra_info("socket")
        inner = getattr(found, "_sock", found)  # asyncio shows a wrapper
        return inner if isinstance(inner, Connection) else None


class Seldom(logging.Filter):
    """Lets a warning through once in `QUIET_S`: strangers decide how often some of them come."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter.filter`."""
        if record.levelno != logging.WARNING or record.exc_info:
            return True
        now, before = time.monotonic(), self._last.get(str(record.msg), -QUIET_S)
        if now - before < QUIET_S:
            return False
        self._last[str(record.msg)] = now
        return True


def _spare() -> int | None:
    try:
        return os.open(os.devnull, os.O_RDONLY)
    except OSError:
        return None
