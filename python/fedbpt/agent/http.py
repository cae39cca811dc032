"""The device's HTTP routes: a Starlette application over an `AgentService`.

Bodies are one MessagePack message (`wire.CONTENT_TYPE`), or JSON for people: send ``application/json``, or ask for
it with ``Accept``. Every 4xx and 5xx body is an `ErrorReply`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from fedbpt import wire
from fedbpt.agent.service import AgentService, metrics_text
from fedbpt.errors import DeviceFailedError, DeviceRefusedError, WireError
from fedbpt.messages import ErrorReply, EvaluateRequest, Message, RoundPlan, RoundProgress

M = TypeVar("M", bound=Message)

MAX_WAIT_S: Final = 60.0
"""Longest that a long poll is held open."""

BODY_TIMEOUT_S: Final = 60.0
"""Longest that a request's body may take to arrive."""

STATUS_OF_CODE: Final = {
    "conflict": 409,
    "busy": 409,
    "wrong-model": 422,
    "unknown-round": 404,
    "unknown-evaluation": 404,
    "malformed": 400,
    "wrong-content-type": 415,
    "too-large": 413,
    "too-slow": 408,
    "not-found": 404,
    "method-not-allowed": 405,
    "stopping": 503,
}
"""The ``code`` of an `ErrorReply` and the HTTP status it comes with; ``work-failed`` and ``internal`` are 500."""


def build_app(service: AgentService) -> Starlette:
    """The routes of one device, as an ASGI application."""
    routes = _Routes(service)
    round_path, evaluation_path = "/v1/rounds/{run}/{round:int}", "/v1/evaluate/{identity}"
    return Starlette(
        routes=[
            Route("/v1/status", routes.status, methods=["GET"]),
            Route(round_path, routes.start, methods=["POST"]),
            Route(round_path, routes.wait, methods=["GET"]),
            Route(round_path, routes.cancel, methods=["DELETE"]),
            Route("/v1/evaluate", routes.start_evaluation, methods=["POST"]),
            Route(evaluation_path, routes.wait_evaluation, methods=["GET"]),
            Route(evaluation_path, routes.cancel_evaluation, methods=["DELETE"]),
            Route("/healthz", routes.healthz, methods=["GET"]),
            Route("/metrics", routes.metrics, methods=["GET"]),
        ],
        exception_handlers={
            WireError: _on_wire_error,
            DeviceRefusedError: _on_refused,
            DeviceFailedError: _on_failed,
            HTTPException: _on_http_exception,
            ClientDisconnect: _on_disconnect,
            Exception: _on_fault,
        },
        lifespan=routes.lifespan,
    )


class _Routes:
    def __init__(self, service: AgentService) -> None:
        self.service = service

    @asynccontextmanager
    async def lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        yield
        self.service.stop()

    async def status(self, request: Request) -> Response:
        return _reply(request, self.service.status())

    async def start(self, request: Request) -> Response:
        plan = await _read(request, RoundPlan)
        if (plan.run, plan.round) != _round_of(request):
            raise WireError(f"the plan is for round {plan.round} of run {plan.run!r}, its address is for another")
        return _reply(request, self.service.start(plan), 202)

    async def wait(self, request: Request) -> Response:
        answer = await self.service.wait(*_round_of(request), seconds=_seconds(request))
        return _reply(request, answer, 202 if isinstance(answer, RoundProgress) else 200)

    async def cancel(self, request: Request) -> Response:
        self.service.cancel(*_round_of(request))
        return Response(status_code=204)

    async def start_evaluation(self, request: Request) -> Response:
        identity = self.service.start_evaluation(await _read(request, EvaluateRequest))
        progress = RoundProgress(run=identity, round=0, state="running")
        return _reply(request, progress, 202, {"location": f"/v1/evaluate/{identity}"})

    async def wait_evaluation(self, request: Request) -> Response:
        answer = await self.service.wait_evaluation(request.path_params["identity"], _seconds(request))
        return _reply(request, answer, 202 if isinstance(answer, RoundProgress) else 200)

    async def cancel_evaluation(self, request: Request) -> Response:
        self.service.cancel_evaluation(request.path_params["identity"])
        return Response(status_code=204)

    async def healthz(self, _request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def metrics(self, _request: Request) -> Response:
        return PlainTextResponse(metrics_text(self.service), media_type="text/plain; version=0.0.4")


# --- requests and replies ------------------------------------------------------------------------------------------


def _round_of(request: Request) -> tuple[str, int]:
    return request.path_params["run"], request.path_params["round"]


def _seconds(request: Request) -> float:
    text = request.query_params.get("wait", "0")
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise WireError(f"wait={text[:40]!r} is no number of seconds")
    return min(seconds, MAX_WAIT_S)


async def _read(request: Request, kind: type[M]) -> M:
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type not in (wire.CONTENT_TYPE, wire.JSON_TYPE):
        raise DeviceRefusedError(f"send {wire.CONTENT_TYPE} or {wire.JSON_TYPE}", "wrong-content-type")
    try:
        body = await asyncio.wait_for(_read_body(request), BODY_TIMEOUT_S)
    except asyncio.TimeoutError as error:
        raise DeviceRefusedError(f"the body took over {BODY_TIMEOUT_S:g} s to arrive", "too-slow") from error
    return wire.decode(body, kind) if content_type == wire.CONTENT_TYPE else wire.decode_json(body, kind)


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > wire.MAX_BODY_BYTES:
            raise DeviceRefusedError(f"the body is over the limit of {wire.MAX_BODY_BYTES} bytes", "too-large")
    return bytes(body)


def _reply(request: Request, message: Message, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    if wire.JSON_TYPE in request.headers.get("accept", ""):
        return Response(wire.encode_json(message), status, headers, wire.JSON_TYPE)
    return Response(wire.encode(message), status, headers, wire.CONTENT_TYPE)


def _error(request: Request, code: str, message: str, status: int) -> Response:
    # Where the body was not read to its end, the connection cannot carry another request.
    headers = {"connection": "close"} if status in (408, 413, 415) else None
    return _reply(request, ErrorReply(code=code, message=message), status, headers)


def _on_wire_error(request: Request, error: Exception) -> Response:
    return _error(request, "malformed", str(error), 400)


def _on_refused(request: Request, error: Exception) -> Response:
    code = error.code if isinstance(error, DeviceRefusedError) else "refused"
    return _error(request, code, str(error), STATUS_OF_CODE.get(code, 400))


def _on_failed(request: Request, error: Exception) -> Response:
    return _error(request, "work-failed", str(error), 500)


def _on_http_exception(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 400
    code = {404: "not-found", 405: "method-not-allowed"}.get(status, "refused")
    return _error(request, code, f"{request.method} {request.url.path[:200]}: {code.replace('-', ' ')}", status)


def _on_disconnect(_request: Request, _gone: Exception) -> Response:
    return Response(status_code=400)  # nobody is there to read it


def _on_fault(request: Request, _fault: Exception) -> Response:
    return _error(request, "internal", "a fault of the device: see its log", 500)
