"""`MonitorServer`: a running run for people and tools to read: JSON, events, metrics.

It is separate from the server that devices call (`CoordinatorServer`): neither accepts the other's tokens.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from fedbpt.coordinator.monitoring.feed import EventFeed, Missed
from fedbpt.coordinator.monitoring.metrics import RunMetrics
from fedbpt.errors import CoordinatorRefusedError
from fedbpt.net.auth import LoopbackOnly, RequireToken, check_token
from fedbpt.net.bodies import EXCEPTION_HANDLERS
from fedbpt.net.prometheus import CONTENT_TYPE, exposition
from fedbpt.net.server import HttpServer
from fedbpt.net.tls import Tls
from fedbpt.protocol import codec
from fedbpt.runs.as_json import run_as_json, run_in_full
from fedbpt.runs.event_log import Line
from fedbpt.runs.store import RunStore, StoredRun

HEARTBEAT_S: Final = 15.0
"""Longest silence of an event stream before a comment is sent, so that proxies keep it open."""

RETRY_MS: Final = 2000
"""When a browser's EventSource reconnects after the stream has ended."""

MAX_READERS: Final = 64
"""Most open event streams."""


class MonitorServer(HttpServer):
    """Serves the runs of ``store``, and the events of ``run``, for which it is a `fedbpt.runs.event_log.Sink`.

    Args:
        store: the run database, read through its own connection.
        token: required of readers; None: loopback only.
        heartbeat_s: see `HEARTBEAT_S`.

    The other arguments are those of `HttpServer`.

    Raises:
        ConfigError: a host beyond loopback without a token, or without TLS or ``allow_insecure``.
    """

    def __init__(
        self,
        store: Path,
        run: str,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        allow_insecure: bool = False,
        feed: EventFeed | None = None,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        check_token(token, host, "--monitor-token")
        self.feed = feed or EventFeed()
        self._store = RunStore(store)
        try:
            history = self._store.history(run) if self._store.find_run(run) else []
            self.metrics = RunMetrics(run, sum(line.metrics.get("seconds", 0.0) for line in history))
            app = build_app(self._store, run, self.feed, self.metrics, token, heartbeat_s)
            super().__init__(app, host, port, tls=tls, allow_insecure=allow_insecure, on_exit=self.feed.close)
        except BaseException:
            self._store.close()
            raise

    def __call__(self, line: Line) -> str:
        return self.metrics(line) or self.feed(line)

    def stop(self) -> None:
        super().stop()
        self._store.close()


def build_app(
    store: RunStore,
    run: str,
    feed: EventFeed,
    metrics: RunMetrics,
    token: str | None = None,
    heartbeat_s: float = HEARTBEAT_S,
) -> Starlette:
    """The routes, as an ASGI application; without ``token``, for requests that name a loopback host only."""
    routes = _Routes(store, run, feed, metrics, heartbeat_s)
    guard = Middleware(LoopbackOnly) if token is None else Middleware(RequireToken, token=token, who="this monitor")
    return Starlette(
        routes=[
            Route("/v1/runs", routes.list_runs, methods=["GET"]),
            Route("/v1/runs/{run}", routes.show_run, methods=["GET"]),
            Route("/v1/runs/{run}/events", routes.events, methods=["GET"]),
            Route("/metrics", routes.show_metrics, methods=["GET"]),
            Route("/healthz", routes.healthz, methods=["GET"]),
        ],
        exception_handlers=EXCEPTION_HANDLERS,
        middleware=[Middleware(_JsonOnly), guard],
        lifespan=routes.lifespan,
    )


class _Routes:
    """Routes that read the store are plain functions, which Starlette runs in threads."""

    def __init__(self, store: RunStore, run: str, feed: EventFeed, metrics: RunMetrics, heartbeat_s: float) -> None:
        self._store = store
        self._run = run
        self._feed = feed
        self._metrics = metrics
        self._heartbeat_s = heartbeat_s

    @asynccontextmanager
    async def lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        self._feed.open()
        yield
        self._feed.close()

    def list_runs(self, _request: Request) -> Response:
        return _json([run_as_json(run) for run in self._store.list_runs()])

    def show_run(self, request: Request) -> Response:
        return _json(run_in_full(self._store, self._named(request)))

    async def events(self, request: Request) -> Response:
        run = request.path_params["run"]
        if run != self._run:
            raise CoordinatorRefusedError(
                f"run {run!r} does not run here: read the events of run {self._run!r}", "unknown-run"
            )
        if self._feed.n_readers >= MAX_READERS:
            raise CoordinatorRefusedError(
                f"{MAX_READERS} event streams are open already: try again later", "too-many", 10.0
            )
        after = request.headers.get("last-event-id", "")
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(self._stream(after), headers=headers, media_type="text/event-stream")

    async def _stream(self, after: str) -> AsyncIterator[bytes]:
        yield f"retry: {RETRY_MS}\n\n".encode()
        async for item in self._feed.read(after, self._heartbeat_s):
            yield as_server_sent(item)

    def show_metrics(self, _request: Request) -> Response:
        return PlainTextResponse(
            exposition(self._metrics.families(self._store.traffic(self._run))), media_type=CONTENT_TYPE
        )

    async def healthz(self, _request: Request) -> Response:
        return PlainTextResponse("ok\n")

    def _named(self, request: Request) -> StoredRun:
        found = self._store.find_run(request.path_params["run"])
        if found is None:
            raise CoordinatorRefusedError("no such run: list the runs with GET /v1/runs", "unknown-run")
        return found


class _JsonOnly:
    """ASGI middleware: errors are JSON too, whatever the Accept header says."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            others = [header for header in scope["headers"] if header[0] != b"accept"]
            scope = {**scope, "headers": [*others, (b"accept", codec.JSON_TYPE.encode())]}
        await self._app(scope, receive, send)


def as_server_sent(item: Line | Missed | None) -> bytes:
    """``item`` as a server-sent event: https://html.spec.whatwg.org/multipage/server-sent-events.html"""
    if item is None:
        return b": nothing new\n\n"
    if isinstance(item, Missed):
        return b'event: Missed\ndata: {"lines":%d}\n\n' % item.lines
    entry = item.entry
    head = f"id: {entry.sitting}-{entry.seq}\nevent: {type(entry.event).__name__}\n"
    return head.encode() + b"data: " + item.json + b"\n\n"


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type=codec.JSON_TYPE)
