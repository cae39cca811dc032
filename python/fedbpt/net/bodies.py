"""Messages as HTTP bodies, for both servers: reading them within limits, replies, and refusals as `ErrorReply`.

Bodies are one MessagePack message (`codec.CONTENT_TYPE`), or JSON for people: send ``application/json``, or ask for
it with ``Accept``. Every 4xx and 5xx body is an `ErrorReply`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeAlias, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from fedbpt.errors import CoordinatorRefusedError, DeviceFailedError, DeviceRefusedError, WireError
from fedbpt.net.deadlines import within
from fedbpt.protocol import codec
from fedbpt.protocol.refusals import WORK_FAILED, WORK_FAULT
from fedbpt.protocol.rounds import ErrorReply
from fedbpt.protocol.specs import Message

M = TypeVar("M", bound=Message)

Handler: TypeAlias = Callable[[Request, Exception], Awaitable[Response]]
"""Starlette would call a plain function in a thread: at the end of a run, one for every device that polls."""

BODY_TIMEOUT_S: Final = 60.0
"""Longest that a request's body may take to arrive."""

STATUS_OF_CODE: Final = {
    "conflict": 409,
    "busy": 409,
    "superseded": 409,
    "unknown-search": 409,
    "replay-differs": 409,
    "wrong-model": 422,
    "wrong-task": 422,
    "unknown-round": 404,
    "unknown-evaluation": 404,
    "unknown-question": 404,
    "unknown-request": 404,
    "unknown-run": 404,
    "wrong-host": 421,
    "malformed": 400,
    "unauthorized": 401,
    "bad-code": 403,
    "wrong-content-type": 415,
    "too-large": 413,
    "too-slow": 408,
    "too-many": 429,
    "not-found": 404,
    "method-not-allowed": 405,
    "stopping": 503,
}
"""The HTTP status that the ``code`` of an `ErrorReply` comes with; `WORK_FAILED`, `WORK_FAULT`, ``internal``: 500."""


async def read(request: Request, kind: type[M], limit: int | None = None) -> M:
    """The message of type ``kind`` that the request holds; refused over ``limit`` bytes (None: the wire's)."""
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type not in (codec.CONTENT_TYPE, codec.JSON_TYPE):
        raise DeviceRefusedError(f"send {codec.CONTENT_TYPE} or {codec.JSON_TYPE}", "wrong-content-type")
    most = codec.MAX_BODY_BYTES if limit is None else limit
    body = await body_of(request, most)
    decode = codec.decode if content_type == codec.CONTENT_TYPE else codec.decode_json
    return decode(body, kind, most)


def seconds(text: str, most: float) -> float:
    """A client's wish for a number of seconds, at most ``most``. Raises `WireError` for what is none."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise WireError(f"wait={text[:40]!r} is no number of seconds")
    return min(found, most)


def reply(request: Request, message: Message, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response with ``message``, in the form that the request asks for."""
    if codec.JSON_TYPE in request.headers.get("accept", ""):
        return Response(codec.encode_json(message), status, headers, codec.JSON_TYPE)
    return Response(codec.encode(message), status, headers, codec.CONTENT_TYPE)


def refusal(
    request: Request, code: str, message: str, status: int | None = None, retry_after_s: float = 0.0
) -> Response:
    """An `ErrorReply`; with ``retry_after_s``, when to come again."""
    chosen = STATUS_OF_CODE.get(code, 400) if status is None else status
    return reply(request, ErrorReply(code=code, message=message), chosen, refusal_headers(chosen, retry_after_s))


def refusal_headers(status: int, retry_after_s: float = 0.0) -> dict[str, str]:
    """What a refusal with ``status`` says beside its body."""
    headers: dict[str, str] = {}
    if status in (401, 408, 413, 415, 429):  # the body was not read to its end: no other request can follow
        headers["connection"] = "close"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if retry_after_s:
        headers["retry-after"] = str(math.ceil(retry_after_s))
    return headers


def retry_after(headers: Mapping[str, str]) -> float:
    """The seconds that a server asks to wait for; 0.0 where it does not say, or gives a date."""
    text = headers.get("retry-after", "")
    return float(text) if text.isdecimal() and len(text) < 6 else 0.0


async def body_of(request: Request, limit: int) -> bytes:
    """The request's body; refused over ``limit`` bytes, or where it takes too long."""
    try:
        return await within(BODY_TIMEOUT_S, _read_body(request, limit))
    except asyncio.TimeoutError as error:
        raise DeviceRefusedError(f"the body took over {BODY_TIMEOUT_S:g} s to arrive", "too-slow") from error


async def _read_body(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise DeviceRefusedError(f"the body is over the limit of {limit} bytes", "too-large")
    return bytes(body)


async def _on_wire_error(request: Request, error: Exception) -> Response:
    return refusal(request, "malformed", str(error))


async def _on_refused(request: Request, error: Exception) -> Response:
    code = error.code if isinstance(error, DeviceRefusedError | CoordinatorRefusedError) else "refused"
    after = error.retry_after_s if isinstance(error, CoordinatorRefusedError) else 0.0
    return refusal(request, code, str(error), retry_after_s=after)


async def _on_failed(request: Request, error: Exception) -> Response:
    is_fault = isinstance(error, DeviceFailedError) and error.is_fault
    return refusal(request, WORK_FAULT if is_fault else WORK_FAILED, str(error), 500)


def faults_as(refuse: Callable[..., Response]) -> dict[Any, Handler]:
    """Handlers of what any server meets, answered by ``refuse`` (`refusal`, in a server's own form)."""

    async def on_http_exception(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 400
        code = {404: "not-found", 405: "method-not-allowed"}.get(status, "refused")
        return refuse(request, code, f"{request.method} {request.url.path[:200]}: {code.replace('-', ' ')}", status)

    async def on_disconnect(_request: Request, _gone: Exception) -> Response:
        return Response(status_code=400)  # nobody is there to read it

    async def on_fault(request: Request, _fault: Exception) -> Response:
        return refuse(request, "internal", "a fault of ours: see the log there", 500)

    return {HTTPException: on_http_exception, ClientDisconnect: on_disconnect, Exception: on_fault}


EXCEPTION_HANDLERS: Final[Mapping[Any, Handler]] = {
    WireError: _on_wire_error,
    DeviceRefusedError: _on_refused,
    CoordinatorRefusedError: _on_refused,
    DeviceFailedError: _on_failed,
    **faults_as(refusal),
}
"""For a Starlette application."""
