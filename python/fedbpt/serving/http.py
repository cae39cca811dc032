"""The routes of the OpenAI-compatible server: ``/v1/models``, ``/v1/completions``, ``/v1/chat/completions``.

Also ``/health`` (as in llama-server), ``/healthz``, and ``/`` with a line of help.
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
from fedbpt.decoders import from_json
from fedbpt.errors import DeviceRefusedError, FedbptError, InputError, ScoringInterrupted
from fedbpt.net.auth import LoopbackOnly, RequireToken
from fedbpt.net.bodies import STATUS_OF_CODE, Handler, body_of, faults_as, refusal_headers
from fedbpt.serving.models import Completion, ServedModel
from fedbpt.serving.protocol import ApiError, ChatRequest, CompletionRequest
from fedbpt.serving.responses import ApiResponse, ChatResponse, CompletionResponse, Json, usage_of
from fedbpt.serving.scheduler import Job, Scheduler, Ticket

log = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 2**20
"""Maximum size of a request."""

RETRY_AFTER_S: Final = 5.0
"""When clients should retry if too many requests are waiting, in seconds."""

R = TypeVar("R", ChatRequest, CompletionRequest)
T = TypeVar("T")


def build_app(
    models: Mapping[str, ServedModel], scheduler: Scheduler, token: str | None = None, origins: Sequence[str] = ()
) -> Starlette:
    """Build the ASGI application.

    Args:
        models: by name.
        scheduler: computes the completions.
        token: what requests must send; None: only requests to loopback's names are served.
        origins: origins of web pages that may call it (CORS), ``*`` for all.
    """
    routes = _Routes(models, scheduler)
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
        middleware=[*_cors(origins), guard],  # in this order because CORS preflight requests have no token
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
    def __init__(self, models: Mapping[str, ServedModel], scheduler: Scheduler) -> None:
        self._models = models
        self._scheduler = scheduler

    @asynccontextmanager
    async def lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        yield
        if not await asyncio.to_thread(self._scheduler.close):
            log.warning("a completion did not stop in time and ends with the process")

    async def list_models(self, _request: Request) -> Response:
        return _json({"object": "list", "data": [_described(model) for model in self._models.values()]})

    async def show_model(self, request: Request) -> Response:
        return _json(_described(self._find_model(request.path_params["name"])))

    async def chat(self, request: Request) -> Response:
        parsed = await _read(request, ChatRequest)
        model = self._find_model(parsed.model)
        settings = parsed.settings(model.recommended)
        messages = [(message.role, message.text) for message in parsed.messages]
        form = ChatResponse(model.name, model.token_bytes, parsed.wants_logprobs)
        return await self._respond(request, parsed, form, [partial(model.chat, messages, settings)])

    async def complete(self, request: Request) -> Response:
        parsed = await _read(request, CompletionRequest)
        model = self._find_model(parsed.model)
        settings = parsed.settings(model.recommended)
        form = CompletionResponse(model.name, model.token_bytes, parsed.wants_logprobs)
        starts = [partial(model.complete, prompt, settings) for prompt in parsed.prompts]
        return await self._respond(request, parsed, form, starts)

    async def health(self, _request: Request) -> Response:
        return _json({"status": "ok"})

    async def healthz(self, _request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def help(self, request: Request) -> Response:
        url = str(request.base_url)
        names = ", ".join(self._models)
        return PlainTextResponse(
            f"fedbpt serves {names} with OpenAI's API: use the base URL {url}v1, or see {url}v1/models\n"
        )

    def _find_model(self, name: str) -> ServedModel:
        if name not in self._models:
            known = ", ".join(self._models)
            raise ApiError(f"unknown model {name!r}: choose one of {known}", "model", "model_not_found", 404)
        return self._models[name]

    async def _respond(
        self,
        request: Request,
        parsed: ChatRequest | CompletionRequest,
        form: ApiResponse,
        starts: Sequence[Callable[[], Completion]],
    ) -> Response:
        if self._scheduler.is_full:
            raise ApiError("too many requests are waiting: try again later", None, "too-many", 429, RETRY_AFTER_S)
        ticket = self._scheduler.submit(starts)
        try:
            if not parsed.stream:
                whole = _json(await _while_connected(request, _whole(form, ticket.jobs)))
                ticket.close()
                return whole
            first = await _while_connected(request, ticket.jobs[0].started())
        except BaseException:
            ticket.close()
            raise
        return _Events(_chunks(form, ticket.jobs, first, parsed.wants_usage), ticket)


class _Events(StreamingResponse):
    """Server-sent events. Cancels the completions if the client stops reading."""

    def __init__(self, content: AsyncIterator[bytes], ticket: Ticket) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.close()


async def _whole(form: ApiResponse, jobs: list[Job]) -> Json:
    found = []
    n_prompt = n_tokens = 0
    for job in jobs:
        completion = await job.started()
        pieces = [piece async for piece in job.pieces()]
        found.append((pieces, completion.finish_reason))
        n_prompt += completion.n_prompt
        n_tokens += completion.n_tokens
    return form.whole(found, usage_of(n_prompt, n_tokens))


async def _chunks(form: ApiResponse, jobs: list[Job], first: Completion, wants_usage: bool) -> AsyncIterator[bytes]:
    n_prompt = n_tokens = 0
    try:
        for index, job in enumerate(jobs):
            completion = first if index == 0 else await job.started()
            opening = form.opening(index)
            if opening is not None:
                yield _event(form.chunk(opening))
            async for piece in job.pieces():
                if form.has_event(piece):
                    yield _event(form.chunk(form.part(index, [piece])))
            yield _event(form.chunk(form.part(index, [], completion.finish_reason)))
            n_prompt += completion.n_prompt
            n_tokens += completion.n_tokens
    except FedbptError as error:  # the status is sent already, so report the error within the stream
        yield _event(_as_error(error)[1])
        return
    if wants_usage:
        yield _event(form.chunk(usage=usage_of(n_prompt, n_tokens)))
    yield b"data: [DONE]\n\n"


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``; cancel it and raise `ClientDisconnect` if the client disconnects."""
    working = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(request.receive())  # after the body, only a disconnection is received
    try:
        await asyncio.wait([working, disconnected], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        disconnected.cancel()
        working.cancel()


async def _read(request: Request, kind: type[R]) -> R:
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise ApiError("unsupported content type: send application/json", None, "wrong-content-type", 415)
    body = await body_of(request, MAX_BODY_BYTES)
    try:
        return from_json(body, kind)
    except DECODE_ERRORS as error:
        raise ApiError(f"invalid request: {error}") from error


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
    """An error response in OpenAI's form, otherwise as `fedbpt.net.bodies.refusal`."""
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
