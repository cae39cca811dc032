"""`HttpServer`: an ASGI application in uvicorn, in this thread or in a new one, over TLS or on loopback."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Final, TypeVar

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedbpt.errors import ConfigError, FedbptError
from fedbpt.net.connections import KEEP_ALIVE_S, Http, LimitWarnings, Listener
from fedbpt.net.deadlines import within
from fedbpt.net.tls import Tls, is_loopback, url_of

S = TypeVar("S", bound="HttpServer")

MAX_DRAIN_BYTES: Final = 32 * 2**20
MAX_DRAIN_S: Final = 2.0
"""Limits for reading the rest of a request that was answered early."""

STALLED_S: Final = 30.0
"""Timeout for a peer to acknowledge sent data, where the system supports it (Linux)."""

IDLE_S: Final = KEEP_ALIVE_S - 15
"""How long our clients keep an idle connection, so that a report needs no new TLS handshake."""

TICKS_PER_S: Final = 10
"""Rate of `on_tick` in uvicorn's server."""

_LIMIT_WARNINGS: Final = LimitWarnings()


class HttpServer:
    """A server that is bound on construction. `run` blocks; `start` and `stop` serve from a thread.

    Args:
        app: the ASGI application.
        host: the address to bind; other machines can only reach it with TLS or ``allow_insecure``.
        port: the port to bind; 0 for any free one, which is then in ``port``.
        tls: TLS settings; with a certificate, the server uses HTTPS.
        allow_insecure: allow plain HTTP beyond loopback.
        on_ready: called with the URL once the server accepts requests.
        on_exit: called on the event loop when the server shuts down, to end long polls.
        websockets: whether the application uses WebSockets (package ``websockets``).
        most_connections: maximum number of connections, beyond which idle ones are closed; None: from the process's
            limit of open files.

    Raises:
        ConfigError: a host beyond loopback without TLS or ``allow_insecure``, or a port outside 0–65535.
        FedbptError: the port is in use, or binding it is not permitted.
    """

    def __init__(
        self,
        app: Any,
        host: str,
        port: int,
        *,
        tls: Tls | None = None,
        allow_insecure: bool = False,
        on_ready: Callable[[str], None] = lambda _url: None,
        on_exit: Callable[[], None] = lambda: None,
        websockets: bool = False,
        most_connections: int | None = None,
    ) -> None:
        tls = tls or Tls()
        if not (tls.serves or allow_insecure or is_loopback(host)):
            raise ConfigError(
                f"{host} can be reached from other machines without encryption: give a certificate (--cert, --key), "
                "allow it on a network you trust (--allow-insecure), or serve on 127.0.0.1",
                field="--cert",
            )
        options = tls.server_options()
        self.host = host
        self.on_ready = on_ready
        self.on_exit = on_exit
        self._socket = _bind(host, port, most_connections)
        self.port: int = self._socket.getsockname()[1]
        self.url = url_of(host, self.port, tls.serves)
        config = uvicorn.Config(
            _DrainRequests(app),
            log_config=None,  # use the program's logging
            log_level="warning",
            access_log=False,
            lifespan="on",
            server_header=False,
            timeout_graceful_shutdown=3,
            timeout_keep_alive=int(KEEP_ALIVE_S),
            http=Http,  # even if a faster parser is installed, for the same behaviour everywhere
            ws="auto" if websockets else "none",
            **options,
        )
        logging.getLogger("uvicorn.error").addFilter(_LIMIT_WARNINGS)
        self._server = _Server(config, self)
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Serve until Ctrl-C or SIGTERM, which do not reach the caller's handlers meanwhile."""
        with quiet_signals():
            self.serve()

    def start(self) -> None:
        """Serve from a new thread; return when the server accepts requests."""
        ready = threading.Event()
        self._server.ready = ready
        self._thread = threading.Thread(target=self.serve, name="fedbpt-http", daemon=True)
        self._thread.start()
        if not ready.wait(10):
            raise FedbptError(f"the server at {self.url} did not start: see the log")

    def stop(self) -> None:
        """End long polls, then shut down."""
        self._server.begin_exit()
        if self._thread is not None:
            self._thread.join(10)
            self._thread = None
        else:
            self._socket.close()

    def shed_idle(self) -> None:
        """Close the connections whose idle timeout has expired; on the event loop."""
        self._socket.shed_idle()

    def serve(self) -> None:
        """Serve in this thread until `stop` is called."""
        try:
            asyncio.run(self._server.serve(sockets=[self._socket]))
        finally:
            self._socket.close()

    def __enter__(self: S) -> S:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class _Server(uvicorn.Server):
    """uvicorn's server with callbacks when it is ready and when it shuts down."""

    def __init__(self, config: uvicorn.Config, owner: HttpServer) -> None:
        super().__init__(config)
        self._owner = owner
        self._loop: asyncio.AbstractEventLoop | None = None
        self.ready: threading.Event | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._loop = asyncio.get_running_loop()
        if self.started:
            self._owner.on_ready(self._owner.url)
            if self.ready is not None:
                self.ready.set()

    async def on_tick(self, counter: int) -> bool:
        if counter % TICKS_PER_S == 0:
            self._owner.shed_idle()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets=sockets)
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # the peer does not read

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self.begin_exit()

    def begin_exit(self) -> None:
        self.should_exit = True
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._owner.on_exit)


class _DrainRequests:
    """ASGI middleware that reads the rest of a request before the response ends, within limits. A connection that is
    closed with unread data is reset, and the client would not see why it was refused.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        ended = False

        async def tracked_receive() -> Message:
            nonlocal ended
            message = await receive()
            ended = ended or message["type"] != "http.request" or not message.get("more_body", False)
            return message

        async def drain() -> None:
            left = MAX_DRAIN_BYTES
            while not ended and left > 0:
                left -= len((await tracked_receive()).get("body", b""))

        async def draining_send(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False) and not ended:
                with suppress(asyncio.TimeoutError):
                    await within(MAX_DRAIN_S, drain())
            await send(message)

        await self._app(scope, tracked_receive, draining_send)


@contextmanager
def quiet_signals() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM, except for handlers installed inside the context; restore the handlers at its end."""
    # uvicorn raises a caught signal again after its shutdown, which here is the regular end.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = [signal.SIGINT, signal.SIGTERM]
    before = [signal.signal(which, lambda *_: None) for which in caught]
    try:
        yield
    finally:
        for which, handler in zip(caught, before, strict=True):
            signal.signal(which, handler)


def _bind(host: str, port: int, most_connections: int | None) -> Listener:
    if not 0 <= port <= 65535:
        raise ConfigError(f"invalid port {port}: use 1 to 65535, or 0 for any free one", field="port", limit=65535)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = Listener(family, socket.SOCK_STREAM, most_connections)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name with a label that is too long
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{host!r} is not an address of this machine: {reason}", field="host") from error
    try:
        if sys.platform != "win32":  # there it would let two servers share a port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # inherited by accepted connections
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * STALLED_S))
        bound.bind(address)
        bound.listen(128)  # on some systems a port in use only fails here
    except OSError as error:
        bound.close()
        raise FedbptError(
            f"cannot serve on {host} port {port}: {error.strerror}; choose another port, or 0 for any free one",
            field="port",
        ) from error
    return bound
