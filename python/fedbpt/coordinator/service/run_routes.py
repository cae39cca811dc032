"""The operator's routes of a coordinator that stays up: hand a run in, follow, list, cancel, fetch its result.

They share the server of the devices, which have tokens of their own: neither's token opens the other's routes.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Final

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from fedbpt.coordinator.monitoring.feed import EventFeed
from fedbpt.coordinator.monitoring.monitor import HEARTBEAT_S, MAX_READERS, as_server_sent
from fedbpt.coordinator.service.run_worker import RunWorker
from fedbpt.errors import CoordinatorRefusedError
from fedbpt.net import tokens
from fedbpt.net.auth import GUESSES
from fedbpt.net.bodies import read, reply
from fedbpt.net.rate_limit import RateLimit
from fedbpt.protocol import codec
from fedbpt.runs.submission import RUNS_PATH, Jobs, Submission

MAX_SUBMISSION_BYTES: Final = 2**20
"""Largest `Submission`: a task file with its templates, and settings."""


def run_routes(worker: RunWorker, token: str) -> list[Route]:
    """The routes; all require ``token``."""
    routes = _Routes(worker, token)
    return [
        Route(RUNS_PATH, routes.list_runs, methods=["GET"]),
        Route(RUNS_PATH, routes.hand_in, methods=["POST"]),
        Route(f"{RUNS_PATH}/{{run}}", routes.show, methods=["GET"]),
        Route(f"{RUNS_PATH}/{{run}}", routes.cancel, methods=["DELETE"]),
        Route(f"{RUNS_PATH}/{{run}}/events", routes.events, methods=["GET"]),
        Route(f"{RUNS_PATH}/{{run}}/result", routes.result, methods=["GET"]),
    ]


class _Routes:
    """The worker's methods read and write files, so they run in threads."""

    def __init__(self, worker: RunWorker, token: str) -> None:
        self._worker = worker
        self._digest = tokens.digest(token)
        self._guesses = RateLimit(*GUESSES)

    async def list_runs(self, request: Request) -> Response:
        self._authenticate(request)
        return reply(request, Jobs(jobs=tuple(await asyncio.to_thread(self._worker.jobs))))

    async def hand_in(self, request: Request) -> Response:
        self._authenticate(request)
        submission = await read(request, Submission, MAX_SUBMISSION_BYTES)
        return reply(request, await asyncio.to_thread(self._worker.hand_in, submission), 202)

    async def show(self, request: Request) -> Response:
        self._authenticate(request)
        return reply(request, await asyncio.to_thread(self._worker.job, request.path_params["run"]))

    async def cancel(self, request: Request) -> Response:
        self._authenticate(request)
        return reply(request, await asyncio.to_thread(self._worker.cancel, request.path_params["run"]), 202)

    async def events(self, request: Request) -> Response:
        self._authenticate(request)
        feed = self._worker.feed(request.path_params["run"])
        if feed.n_readers >= MAX_READERS:
            raise CoordinatorRefusedError(
                f"{MAX_READERS} event streams are open already: try again later", "too-many", 10.0
            )
        feed.open()
        after = request.headers.get("last-event-id", "")
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(_stream(feed, after), headers=headers, media_type="text/event-stream")

    async def result(self, request: Request) -> Response:
        self._authenticate(request)
        body = await asyncio.to_thread(self._worker.result, request.path_params["run"])
        return Response(body, media_type=codec.CONTENT_TYPE)

    def _authenticate(self, request: Request) -> None:
        if tokens.matches(tokens.bearer(request.headers), self._digest):
            return
        wait_s = self._guesses.take(request.client.host if request.client else "")
        if wait_s:
            raise CoordinatorRefusedError(
                f"too many requests without the admin token: try again in {math.ceil(wait_s)} s", "too-many", wait_s
            )
        raise CoordinatorRefusedError(
            "this is not the coordinator's admin token: copy the file that `fedbpt coordinator` names when it starts"
            " (--admin-token FILE)",
            "unauthorized",
        )


async def _stream(feed: EventFeed, after: str) -> AsyncIterator[bytes]:
    async for item in feed.read(after, HEARTBEAT_S):
        yield as_server_sent(item)
