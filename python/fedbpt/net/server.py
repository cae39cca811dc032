"""`HttpServer`: an ASGI application run by uvicorn, in this thread or in one of its own, over TLS or on loopback."""

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
from fedbpt.net.connections import KEPT_S, Http, Listener, Seldom
from fedbpt.net.deadlines import within
from fedbpt.net.tls import Tls, is_loopback, url_of

S = TypeVar("S", bound="HttpServer")

MOST_UNREAD_BYTES: Final = 32 * 2**20
MOST_UNREAD_S: Final = 2.0
"""What is read of a request that was answered before its end."""

STALLED_S: Final = 30.0
"""A peer that takes nothing of what is sent to it for so long is dropped, where the system can (Linux)."""

IDLE_S: Final = KEPT_S - 15
"""How long our callers keep a connection that they do not use: a report need not wait for a TLS handshake."""

TICKS_PER_S: Final = 10
"""Of uvicorn's server."""

_SELDOM: Final = Seldom()


class HttpServer:
    """A server, bound at once: `run` blocks, `start` and `stop` serve from a thread.

    Args:
        host: an address beyond loopback needs TLS, or ``allow_insecure``.
        port: 0: any free one; see ``port`` afterwards, or ``on_ready``.
        tls: with a certificate, HTTPS.
        on_ready: called with the URL once requests are answered.
        on_exit: called on the event loop when the server is to end: lets long polls go.
        websockets: whether the application speaks them, by the package ``websockets``.
        most_connections: at once, idle ones are closed beyond; None: by the process's limit of open files.

    Raises:
        ConfigError: a host beyond loopback without TLS or ``allow_insecure``, or a port outside 0–65535.
        FedbptError: the port is in use or may not be bound.
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
                f"{host} can be reached from other machines and there is no encryption: give a certificate (--cert,"
                " --key), allow it on a network you trust (--allow-insecure), or serve on 127.0.0.1"
            )
        options = tls.server_options()
        self.host = host
        self.on_ready = on_ready
        self.on_exit = on_exit
        self._socket = _bind(host, port, most_connections)
        self.port: int = self._socket.getsockname()[1]
        self.url = url_of(host, self.port, tls.serves)
        config = uvicorn.Config(
            _ReadToTheEnd(app),
            log_config=None,  # records go where the program's do
            log_level="warning",
            access_log=False,
            lifespan="on",
            server_header=False,
            timeout_graceful_shutdown=3,
            timeout_keep_alive=int(KEPT_S),
            http=Http,  # also where a faster parser happens to be installed: one behaviour everywhere
            ws="auto" if websockets else "none",
            **options,
        )
        logging.getLogger("uvicorn.error").addFilter(_SELDOM)
        self._server = _Server(config, self)
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Serve until Ctrl-C or SIGTERM. No handler of the caller's sees those signals meanwhile."""
        with quiet_signals():
            self.serve()

    def start(self) -> None:
        """Serve from a thread; returns when requests are answered."""
        ready = threading.Event()
        self._server.ready = ready
        self._thread = threading.Thread(target=self.serve, name="fedbpt-http", daemon=True)
        self._thread.start()
        if not ready.wait(10):
            raise FedbptError(f"the server at {self.url} did not start: see the log")

    def stop(self) -> None:
        """Let long polls go, then end."""
        self._server.begin_exit()
        if self._thread is not None:
            self._thread.join(10)
            self._thread = None
        else:
            self._socket.close()

    def shed_idle(self) -> None:
        """Close the connections that have been idle for too long; on the event loop."""
        self._socket.shed_idle()

    def serve(self) -> None:
        """Serve in this thread until the server is told to stop."""
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
    """uvicorn's server, which also says when it is ready and lets long polls go when it is asked to stop."""

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
            connection.transport.abort()  # it does not read: what is left for it cannot be sent

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self.begin_exit()

    def begin_exit(self) -> None:
        self.should_exit = True
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._owner.on_exit)


class _ReadToTheEnd:
    """ASGI middleware: an answer ends when the request has, within limits. A connection that is closed with something
    left to read is reset, and who sent it does not see why it was refused.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        ended = False

        async def hear() -> Message:
            nonlocal ended
            message = await receive()
            ended = ended or message["type"] != "http.request" or not message.get("more_body", False)
            return message

        async def read_out() -> None:
            left = MOST_UNREAD_BYTES
            while not ended and left > 0:
                left -= len((await hear()).get("body", b""))

        async def say(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False) and not ended:
                with suppress(asyncio.TimeoutError):
                    await within(MOST_UNREAD_S, read_out())
            await send(message)

        await self._app(scope, hear, say)


@contextmanager
def quiet_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM are nothing meanwhile, but for who handles them within; then again what they were."""
    # uvicorn raises the signals it caught once more when it has shut down; here that is the end, not an error.
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
        raise ConfigError(f"{port} is no port: give one of 1 to 65535, or 0 for any free one")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = Listener(family, socket.SOCK_STREAM, most_connections)
    except (OSError, UnicodeError) as error:  # the latter: a name with a part that is too long
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{host!r} is no address of this machine: {reason}") from error
    try:
        if sys.platform != "win32":  # there it would let two servers share a port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # its connections inherit it
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * STALLED_S))
        bound.bind(address)
        bound.listen(128)  # where another listens on the port already, some systems say so only here
    except OSError as error:
        bound.close()
        raise FedbptError(
            f"cannot serve on {host} port {port}: {error.strerror}; choose another port, or 0 for any free one"
        ) from error
    return bound
