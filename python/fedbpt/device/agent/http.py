"""The device's HTTP routes, a Starlette application over an `AgentService`. For bodies see `fedbpt.net.bodies`."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from fedbpt.device.agent.service import AgentService, metrics_text
from fedbpt.errors import WireError
from fedbpt.net.auth import RequireToken
from fedbpt.net.bodies import EXCEPTION_HANDLERS, read, reply, seconds
from fedbpt.net.prometheus import CONTENT_TYPE as METRICS_TYPE
from fedbpt.protocol.questions import Answer, Question
from fedbpt.protocol.rounds import EvaluateRequest, RoundPlan, RoundProgress
from fedbpt.search.compact_plans import Replayer, short_report

MAX_WAIT_S: Final = 60.0
"""Maximum hold of a long poll, seconds."""


def build_app(service: AgentService, token: str | None = None) -> Starlette:
    """The routes of one device as an ASGI application; with ``token``, all but ``/healthz`` require it."""
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
            Route("/v1/questions", routes.start_question, methods=["POST"]),
            Route("/v1/questions/{identity}", routes.wait_question, methods=["GET"]),
            Route("/v1/questions/{identity}", routes.cancel_question, methods=["DELETE"]),
            Route("/healthz", routes.healthz, methods=["GET"]),
            Route("/metrics", routes.metrics, methods=["GET"]),
        ],
        exception_handlers=EXCEPTION_HANDLERS,
        middleware=[] if token is None else [Middleware(RequireToken, token=token, who="this device")],
        lifespan=routes.lifespan,
    )


class _Routes:
    def __init__(self, service: AgentService) -> None:
        self.service = service
        self._replayer = Replayer()

    @asynccontextmanager
    async def lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        yield
        self.service.stop()

    async def status(self, request: Request) -> Response:
        return reply(request, self.service.status())

    async def start(self, request: Request) -> Response:
        plan = await read(request, RoundPlan)
        if (plan.run, plan.round) != _round_of(request):
            raise WireError(
                f"the plan is for round {plan.round} of run {plan.run!r}: expected the same in the path", field="round"
            )
        whole = await run_in_threadpool(self._replayer.whole, plan)
        progress = self.service.start(whole, _share(request))
        return await self.wait(request) if _seconds(request) else reply(request, progress, 202)

    async def wait(self, request: Request) -> Response:
        answer = await self.service.wait(*_round_of(request), seconds=_seconds(request))
        if isinstance(answer, RoundProgress):
            return reply(request, answer, 202)
        return reply(request, short_report(answer) if request.query_params.get("short") == "1" else answer)

    async def cancel(self, request: Request) -> Response:
        self.service.cancel(*_round_of(request))
        return Response(status_code=204)

    async def start_evaluation(self, request: Request) -> Response:
        identity = self.service.start_evaluation(await read(request, EvaluateRequest))
        progress = RoundProgress(run=identity, round=0, state="running")
        return reply(request, progress, 202, {"location": f"/v1/evaluate/{identity}"})

    async def wait_evaluation(self, request: Request) -> Response:
        answer = await self.service.wait_evaluation(request.path_params["identity"], _seconds(request))
        return reply(request, answer, 202 if isinstance(answer, RoundProgress) else 200)

    async def cancel_evaluation(self, request: Request) -> Response:
        self.service.cancel_evaluation(request.path_params["identity"])
        return Response(status_code=204)

    async def start_question(self, request: Request) -> Response:
        identity = self.service.start_question(await read(request, Question))
        return reply(request, Answer(), 202, {"location": f"/v1/questions/{identity}"})

    async def wait_question(self, request: Request) -> Response:
        seen = request.query_params.get("seen", "0")
        if not (seen.isascii() and seen.isdecimal() and len(seen) < 8):
            raise WireError(f"seen must be a number of pieces, got {seen[:40]!r}", field="seen")
        identity = request.path_params["identity"]
        return reply(request, await self.service.wait_question(identity, _seconds(request), int(seen)))

    async def cancel_question(self, request: Request) -> Response:
        self.service.cancel_question(request.path_params["identity"])
        return Response(status_code=204)

    async def healthz(self, _request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def metrics(self, _request: Request) -> Response:
        return PlainTextResponse(metrics_text(self.service), media_type=METRICS_TYPE)


def _round_of(request: Request) -> tuple[str, int]:
    return request.path_params["run"], request.path_params["round"]


def _share(request: Request) -> float | None:
    """The share of all devices that the plan says its device is drawn from; None: it says none."""
    text = request.query_params.get("share")
    if text is None:
        return None
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0.0 < share <= 1.0:
        raise WireError(f"share must be above 0 and at most 1, got {text[:40]!r}", field="share")
    return share


def _seconds(request: Request) -> float:
    return seconds(request.query_params.get("wait", "0"), MAX_WAIT_S)
