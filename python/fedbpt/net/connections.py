"""`Listener`: a listening socket that limits the number of connections and their idle time.

asyncio keeps a silent connection forever. Once file descriptors run out, it logs a traceback for each connection that
it cannot accept, thousands per second. So idle connections are closed: after a timeout, and while there are too many,
those that have been idle longest. Connections with a request in progress are never closed.
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

REQUEST_TIMEOUT_S: Final = 15.0
"""Timeout for the first request of a new connection, including the TLS handshake."""

KEEP_ALIVE_S: Final = 75.0
"""Idle timeout after a request. Our clients close first (`fedbpt.net.server.IDLE_S`)."""

RESERVED_DESCRIPTORS: Final = 64
"""Minimum number of file descriptors left to the rest of the process, which gets at least a quarter of all."""

WARNING_INTERVAL_S: Final = 60.0
"""Minimum time between two warnings of the same kind."""

_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def most_connections() -> int:
    """The maximum number of connections, from the process's limit of open files."""
    if sys.platform == "win32":
        return 512
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        soft = 1 << 16
    return int(max(soft - max(RESERVED_DESCRIPTORS, soft // 4), 8))


class Connection(socket.socket):
    """An accepted connection. ``idle_since``: when it became idle; None during a request."""

    listener: Listener
    idle_since: float | None
    had_request = False
    """Whether a request was answered."""
    is_shed = False

    def shed(self) -> None:
        """Shut it down both ways, so that its transport sees the end and closes it."""
        self.is_shed = True
        with suppress(OSError):  # already closed by the peer
            self.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.listener.forget(self)
        super().close()


class Listener(socket.socket):
    """A TCP socket for `asyncio.loop.create_server`. Its connections must be used from one event loop.

    ``most``: maximum number of connections; None: from the process's limit of open files.
    """

    def __init__(self, family: int, kind: int, most: int | None = None) -> None:
        super().__init__(family, kind)
        self.most = most_connections() if most is None else most
        self._open: dict[int, Connection] = {}
        self._spare = _spare()
        self._warned = -WARNING_INTERVAL_S

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept as `socket.socket.accept`. Also raises BlockingIOError if the loop must close connections first."""
        if len(self._open) > self.most + RESERVED_DESCRIPTORS // 2:
            raise BlockingIOError  # the event loop has not yet closed connections that were shed
        try:
            plain, address = super().accept()
        except OSError as error:
            if error.errno in _EXHAUSTED:
                self._reject()
                raise BlockingIOError from error
            raise
        connection = Connection(plain.family, plain.type, plain.proto, plain.detach())
        connection.listener = self
        connection.idle_since = time.monotonic()
        self._open[connection.fileno()] = connection
        if len(self._open) > self.most and not self._shed_one(but=connection):
            connection.close()  # all others have requests in progress
            raise BlockingIOError
        return connection, address

    def forget(self, connection: Connection) -> None:
        """Remove a connection that is being closed."""
        if self._open.get(connection.fileno()) is connection:
            del self._open[connection.fileno()]

    def of(self, fileno: int) -> Connection | None:
        """The open connection with the file descriptor ``fileno``."""
        return self._open.get(fileno)

    def shed_idle(self) -> None:
        """Close the connections whose idle timeout has expired."""
        now = time.monotonic()
        for connection in list(self._open.values()):
            limit = KEEP_ALIVE_S if connection.had_request else REQUEST_TIMEOUT_S
            if connection.idle_since is not None and now - connection.idle_since > limit and not connection.is_shed:
                connection.shed()

    def close(self) -> None:
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
        super().close()

    def _shed_one(self, but: Connection) -> bool:
        """Close the connection that has been idle longest, preferably one without a request so far."""
        idle = [
            (each.had_request, each.idle_since, fileno)
            for fileno, each in self._open.items()
            if each.idle_since is not None and each is not but and not each.is_shed
        ]
        self._warn(f"{len(self._open)} connections are open, the maximum: closing idle ones")
        if not idle:
            return False
        self._open[min(idle)[2]].shed()
        return True

    def _reject(self) -> None:
        """Use the spare descriptor to accept and close a connection, when no other descriptor is left."""
        self._warn("no file descriptor is left for a new connection: closing idle ones, rejecting new ones")
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
            with suppress(OSError):
                super().accept()[0].close()
            self._spare = _spare()
        idle = [each for each in self._open.values() if each.idle_since is not None and not each.is_shed]
        for connection in idle[: max(len(idle) // 4, 1)]:
            connection.shed()
        if self._spare is None:
            self._spare = _spare()

    def _warn(self, text: str) -> None:
        if time.monotonic() - self._warned > WARNING_INTERVAL_S:
            log.warning("port %d: %s", self.getsockname()[1], text)
        self._warned = time.monotonic()


class Http(H11Protocol):
    """uvicorn's protocol, which records on the connection whether a request is in progress."""

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._mark()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._mark()

    def handle_websocket_upgrade(self, event: Any) -> None:
        if (connection := self._connection()) is not None:
            connection.idle_since = None  # never idle again; WebSocket pings detect a dead peer
        super().handle_websocket_upgrade(event)

    def _mark(self) -> None:
        connection = self._connection()
        if connection is None or self.transport.get_protocol() is not self:
            return
        if self.cycle is not None and not self.cycle.response_complete:
            connection.idle_since = None
        elif connection.idle_since is None:
            connection.idle_since = time.monotonic()
            connection.had_request = True

    def _connection(self) -> Connection | None:
        found = self.transport.get_extra_info("socket")
        inner = getattr(found, "_sock", found)  # asyncio returns a wrapper
        return inner if isinstance(inner, Connection) else None


class LimitWarnings(logging.Filter):
    """Passes each warning once per `WARNING_INTERVAL_S`, as remote clients could trigger some at will."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING or record.exc_info:
            return True
        now = time.monotonic()
        before = self._last.get(str(record.msg), -WARNING_INTERVAL_S)
        if now - before < WARNING_INTERVAL_S:
            return False
        self._last[str(record.msg)] = now
        return True


def _spare() -> int | None:
    try:
        return os.open(os.devnull, os.O_RDONLY)
    except OSError:
        return None
