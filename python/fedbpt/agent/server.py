"""`AgentServer`: a device's HTTP server, run by uvicorn; `serve` is the whole of a device process."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from fedbpt.agent.http import build_app
from fedbpt.agent.service import AgentService
from fedbpt.errors import ConfigError, FedbptError

log = logging.getLogger(__name__)


def announce(host: str, port: int) -> None:
    """Print one machine-readable line, so that a parent process learns the port: ``{"ready": {"url": ...}}``."""
    print(json.dumps({"ready": {"host": host, "port": port, "url": _url(host, port)}}), flush=True)


def serve(
    service: AgentService,
    host: str = "127.0.0.1",
    port: int = 8401,
    *,
    on_ready: Callable[[str, int], None] | None = announce,
    allow_insecure: bool = False,
) -> None:
    """Serve until Ctrl-C or SIGTERM, then cancel the work and return. Raises as `AgentServer` does."""
    AgentServer(service, host, port, on_ready=on_ready, allow_insecure=allow_insecure).run()


class AgentServer:
    """A device's server, bound at once: `run` blocks, `start` and `stop` serve from a thread.

    Args:
        host: an address beyond loopback needs ``allow_insecure``: there is no TLS yet, anyone in reach could use it.
        port: 0: any free one; see ``port`` afterwards, or ``on_ready``.
        on_ready: called with host and port once requests are answered.

    Raises:
        ConfigError: a host beyond loopback without ``allow_insecure``, or a port outside 0–65535.
        FedbptError: the port is in use or may not be bound.
    """

    def __init__(
        self,
        service: AgentService,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        on_ready: Callable[[str, int], None] | None = None,
        allow_insecure: bool = False,
    ) -> None:
        if not allow_insecure and not _is_loopback(host):
            raise ConfigError(
                f"{host} can be reached from other machines and there is no encryption:"
                " allow it on a network you trust (--allow-insecure), or serve on 127.0.0.1"
            )
        self.service = service
        self.host = host
        self._on_ready = on_ready
        self._socket = _bind(host, port)
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            build_app(service),
            log_level="warning",
            access_log=False,
            lifespan="on",
            server_header=False,
            timeout_graceful_shutdown=3,
            ws="none",
        )
        self._server = _Server(config, self)
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return _url(self.host, self.port)

    def run(self) -> None:
        """Serve until Ctrl-C or SIGTERM. No handler of the caller's sees those signals meanwhile."""
        with _quiet_signals():
            self._serve()

    def start(self) -> None:
        """Serve from a thread; returns when requests are answered."""
        ready = threading.Event()
        self._server.ready = ready
        self._thread = threading.Thread(target=self._serve, name="fedbpt-agent", daemon=True)
        self._thread.start()
        if not ready.wait(10):
            raise FedbptError(f"the device's server at {self.url} did not start: see the log")

    def stop(self) -> None:
        """End the service's work, then the server."""
        self._server.begin_exit()
        if self._thread is not None:
            self._thread.join(10)
            self._thread = None
        else:
            self._socket.close()

    def __enter__(self) -> AgentServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _serve(self) -> None:
        try:
            asyncio.run(self._server.serve(sockets=[self._socket]))
        finally:
            self._socket.close()
            if not self.service.close():
                log.warning("the device's work did not stop in time and ends with the process")

    def ready(self) -> None:
        if self._on_ready is None:
            return
        try:
            self._on_ready(self.host, self.port)
        except OSError as error:  # what it prints to is full or gone: nobody reads it, coordinators ask all the same
            log.warning("cannot say that the device serves on %s: %s", self.url, error.strerror or error)


class _Server(uvicorn.Server):
    """uvicorn's server, which also says when it is ready and lets long polls go when it is asked to stop."""

    def __init__(self, config: uvicorn.Config, owner: AgentServer) -> None:
        super().__init__(config)
        self._owner = owner
        self._loop: asyncio.AbstractEventLoop | None = None
        self.ready: threading.Event | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._loop = asyncio.get_running_loop()
        if self.started:
            self._owner.ready()
            if self.ready is not None:
                self.ready.set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self.begin_exit()

    def begin_exit(self) -> None:
        self.should_exit = True
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._owner.service.stop)


@contextmanager
def _quiet_signals() -> Iterator[None]:
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


def _bind(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ConfigError(f"{port} is no port: give one of 1 to 65535, or 0 for any free one")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"{host} is no address of this machine: {error.strerror}") from error
    try:
        if sys.platform != "win32":  # there it would let two servers share a port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(128)  # where another listens on the port already, some systems say so only here
    except OSError as error:
        bound.close()
        raise FedbptError(
            f"cannot serve on {host} port {port}: {error.strerror}; choose another port, or 0 for any free one"
        ) from error
    return bound


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
