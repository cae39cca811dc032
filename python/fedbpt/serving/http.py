"""The routes of the OpenAI-compatible server: ``/v1/models``, ``/v1/completions``, ``/v1/chat/completions``.

Beside them ``/health`` (as llama-server has it), ``/healthz``, and ``/`` with a line of help.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from fedbpt.checking import DECODE_ERRORS
from fedbpt.errors import DeviceRefusedError, FedbptError, InputError, ScoringInterrupted
from fedbpt.net.auth import LoopbackOnly, RequireToken
from fedbpt.net.bodies import STATUS_OF_CODE, Handler, body_of, faults_as, refusal_headers
from fedbpt.serving.answers import Answer, ServedModel
from fedbpt.serving.desk import Desk, Job, Ticket
from fedbpt.serving.protocol import ApiError, ChatRequest, CompletionRequest
from fedbpt.serving.replies import ChatReply, Json, Reply, TextReply, usage_of

log = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 2**20
"""Largest request."""

RETRY_AFTER_S: Final = 5.0
"""When to come again to a server where too many wait."""

R = TypeVar("R", ChatRequest, CompletionRequest)
T = TypeVar("T")


def build_app(
    models: Mapping[str, ServedModel], desk: Desk, token: str | None = None, origins: Sequence[str] = ()
) -> Starlette:
    """The routes, as an ASGI application; without ``token`` it answers under loopback's names only.

    ``origins``: of web pages that may call it (CORS), ``*`` for all.
    """
    routes = _Routes(models, desk)
    guard = (
        Middleware(LoopbackOnly, refuse=refusal)
        if token is None
        else Middleware(RequireToken, token=token, who="this server", refuse=refusal)
    )
    return Starlette(
        routes=[
            Route("/v1/models", routes.list_models, methods=["GET"]),
            Route("/v1/models/{name:path}", routes.show_model, methods=["GET"]),
            Route("/v1/completions", routes.complete, methods=["POST"]),
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/health", routes.health, methods=["GET"]),
            Route("/healthz", routes.healthz, methods=["GET"]),
            Route("/", routes.help, methods=["GET"]),
        ],
        exception_handlers=_HANDLERS,
        middleware=[*_cors(origins), guard],  # a browser asks without the token what it may send
        lifespan=routes.lifespan,
    )


def _cors(origins: Sequence[str]) -> list[Middleware]:
    allowed: dict[str, Any] = {
        "allow_origins": list(origins),
        "allow_methods": ["GET", "POST"],
        "allow_headers": ["*"],
        "expose_headers": ["retry-after"],
        "allow_private_network": True,
    }
    return [Middleware(CORSMiddleware, **allowed)] if origins else []


class _Routes:
    def __init__(self, models: Mapping[str, ServedModel], desk: Desk) -> None:
        self._models, self._desk = models, desk

    @asynccontextmanager
    async def lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        yield
        if not await asyncio.to_thread(self._desk.close):
            log.warning("an answer did not stop in time and ends with the process")

    async def list_models(self, _request: Request) -> Response:
        return _json({"object": "list", "data": [_described(model) for model in self._models.values()]})

    async def show_model(self, request: Request) -> Response:
        return _json(_described(self._named(request.path_params["name"])))

    async def chat(self, request: Request) -> Response:
        asked = await _read(request, ChatRequest)
        model = self._named(asked.model)
        settings = asked.how(model.recommended)
        messages = [(message.role, message.text) for message in asked.messages]
        made = ChatReply(model.name, model.token_bytes, asked.wants_logprobs)
        return await self._answer(request, asked, made, [partial(model.chat, messages, settings)])

    async def complete(self, request: Request) -> Response:
        asked = await _read(request, CompletionRequest)
        model = self._named(asked.model)
        settings = asked.how(model.recommended)
        made = TextReply(model.name, model.token_bytes, asked.wants_logprobs)
        begins = [partial(model.complete, prompt, settings) for prompt in asked.prompts]
        return await self._answer(request, asked, made, begins)

    async def health(self, _request: Request) -> Response:
        return _json({"status": "ok"})

    async def healthz(self, _request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def help(self, request: Request) -> Response:
        url, names = str(request.base_url), ", ".join(self._models)
        return PlainTextResponse(
            f"fedbpt serves {names} by OpenAI's API: give a client the base URL {url}v1, or look at {url}v1/models\n"
        )

    def _named(self, name: str) -> ServedModel:
        if name not in self._models:
            known = ", ".join(self._models)
            raise ApiError(f"there is no model {name!r} here, there are {known}", "model", "model_not_found", 404)
        return self._models[name]

    async def _answer(
        self,
        request: Request,
        asked: ChatRequest | CompletionRequest,
        made: Reply,
        begins: Sequence[Callable[[], Answer]],
    ) -> Response:
        if self._desk.is_full:
            raise ApiError(
                "too many requests wait for their turn: come again later", None, "too-many", 429, RETRY_AFTER_S
            )
        ticket = self._desk.take(begins)
        try:
            if not asked.stream:
                whole = _json(await _while_there(request, _whole(made, ticket.jobs)))
                ticket.close()
                return whole
            first = await _while_there(request, ticket.jobs[0].begun())
        except BaseException:
            ticket.close()
            raise
        return _Events(_chunks(made, ticket.jobs, first, asked.wants_usage), ticket)


class _Events(StreamingResponse):
    """Server-sent events; whoever does not read them to the end has the answers cancelled."""

    def __init__(self, content: AsyncIterator[bytes], ticket: Ticket) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.close()


async def _whole(made: Reply, jobs: list[Job]) -> Json:
    found, n_prompt, n_tokens = [], 0, 0
    for job in jobs:
        answer = await job.begun()
        pieces = [piece async for piece in job.pieces()]
        found.append((pieces, answer.finish_reason))
        n_prompt, n_tokens = n_prompt + answer.n_prompt, n_tokens + answer.n_tokens
    return made.whole(found, usage_of(n_prompt, n_tokens))


async def _chunks(made: Reply, jobs: list[Job], first: Answer, wants_usage: bool) -> AsyncIterator[bytes]:
    n_prompt = n_tokens = 0
    try:
        for index, job in enumerate(jobs):
            answer = first if index == 0 else await job.begun()
            opening = made.opening(index)
            if opening is not None:
                yield _event(made.chunk(opening))
            async for piece in job.pieces():
                if made.says(piece):
                    yield _event(made.chunk(made.part(index, [piece])))
            yield _event(made.chunk(made.part(index, [], answer.finish_reason)))
            n_prompt, n_tokens = n_prompt + answer.n_prompt, n_tokens + answer.n_tokens
    except FedbptError as error:  # the reply has begun: it can only be told within
        yield _event(_as_error(error)[1])
        return
    if wants_usage:
        yield _event(made.chunk(usage=usage_of(n_prompt, n_tokens)))
    yield b"data: [DONE]\n\n"


async def _while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` gives; it is dropped where the client hangs up. Raises `ClientDisconnect` then."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(request.receive())  # after the body, only a disconnection comes
    try:
        await asyncio.wait([working, gone], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        gone.cancel()
        working.cancel()


async def _read(request: Request, kind: type[R]) -> R:
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise ApiError("send application/json", None, "wrong-content-type", 415)
    body = await body_of(request, MAX_BODY_BYTES)
    try:
        return msgspec.json.decode(body, type=kind)
    except DECODE_ERRORS as error:
        raise ApiError(f"the request is not what it should be: {error}") from error


def _described(model: ServedModel) -> Json:
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "fedbpt"}


def _json(value: Json, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def _event(value: Json) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


# --- errors, in OpenAI's form --------------------------------------------------------------------------------------


def refusal(
    request: Request, code: str, message: str, status: int | None = None, retry_after_s: float = 0.0
) -> Response:
    """An error reply; with ``retry_after_s``, when to come again. As `http_bodies.refusal` otherwise."""
    del request
    chosen = STATUS_OF_CODE.get(code, 400) if status is None else status
    return _json(_error(message, chosen, None, code), chosen, refusal_headers(chosen, retry_after_s))


def _error(message: str, status: int, param: str | None, code: str | None) -> Json:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _as_error(error: Exception) -> tuple[int, Json]:
    if isinstance(error, ApiError):
        return error.status, _error(str(error), error.status, error.param, error.code)
    if isinstance(error, InputError):
        return 400, _error(str(error), 400, None, None)
    status = 503 if isinstance(error, ScoringInterrupted) else 500
    return status, _error(str(error), status, None, None)


async def _on_error(_request: Request, error: Exception) -> Response:
    status, body = _as_error(error)
    after_s = error.retry_after_s if isinstance(error, ApiError) else 0.0
    return _json(body, status, {"retry-after": str(math.ceil(after_s))} if after_s else None)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == 405 and request.method == "OPTIONS":
        return Response(status_code=204, headers={"allow": f"{(error.headers or {})['Allow']}, OPTIONS"})
    return await _FAULTS[HTTPException](request, error)


async def _on_refused(request: Request, error: Exception) -> Response:
    return refusal(request, error.code if isinstance(error, DeviceRefusedError) else "refused", str(error))


_FAULTS: Final = faults_as(refusal)
_HANDLERS: Final[Mapping[Any, Handler]] = {
    **_FAULTS,
    FedbptError: _on_error,
    DeviceRefusedError: _on_refused,
    HTTPException: _on_http_exception,
}
