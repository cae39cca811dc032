"""Messages as HTTP bodies: reading of requests within limits, responses, and errors as `ErrorReply`.

A body is one MessagePack message (`codec.CONTENT_TYPE`), or JSON for people: send ``application/json``, or request it
with ``Accept``. Every 4xx and 5xx body is an `ErrorReply`.
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
"""Async, since Starlette calls a plain function in a thread: at the end of a run, one for every polling device."""

BODY_TIMEOUT_S: Final = 60.0
"""Timeout for reading a request's body."""

STATUS_OF_CODE: Final = {
    "conflict": 409,
    "busy": 409,
    "superseded": 409,
    "unknown-search": 409,
    "replay-differs": 409,
    "wrong-model": 422,
    "wrong-task": 422,
    "not-drawn": 422,
    "unknown-round": 404,
    "unknown-evaluation": 404,
    "unknown-question": 404,
    "unknown-request": 404,
    "unknown-run": 404,
    "wrong-host": 421,
    "malformed": 400,
    "unauthorized": 401,
    "bad-code": 403,
    "over-quota": 403,
    "wrong-content-type": 415,
    "too-large": 413,
    "too-slow": 408,
    "too-many": 429,
    "not-found": 404,
    "method-not-allowed": 405,
    "stopping": 503,
}
"""HTTP status by the ``code`` of an `ErrorReply`; 500 for `WORK_FAILED`, `WORK_FAULT` and ``internal``."""


async def read(request: Request, kind: type[M], limit: int | None = None) -> M:
    """Decode the request's message of type ``kind``, of at most ``limit`` bytes (default: `codec.MAX_BODY_BYTES`).

    Raises `DeviceRefusedError` for a wrong content type or a body that is too large or too slow, and `WireError`.
    """
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type not in (codec.CONTENT_TYPE, codec.JSON_TYPE):
        raise DeviceRefusedError(f"send {codec.CONTENT_TYPE} or {codec.JSON_TYPE}", "wrong-content-type")
    most = codec.MAX_BODY_BYTES if limit is None else limit
    body = await body_of(request, most)
    decode = codec.decode if content_type == codec.CONTENT_TYPE else codec.decode_json
    return decode(body, kind, most)


def seconds(text: str, most: float) -> float:
    """Parse a request's ``wait`` in seconds, capped at ``most``. Raises `WireError`."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise WireError(f"wait must be a number of seconds, got {text[:40]!r}", field="wait")
    return min(found, most)


def reply(request: Request, message: Message, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Build a response with ``message``, as JSON if the request accepts it."""
    if codec.JSON_TYPE in request.headers.get("accept", ""):
        return Response(codec.encode_json(message), status, headers, codec.JSON_TYPE)
    return Response(codec.encode(message), status, headers, codec.CONTENT_TYPE)


def refusal(
    request: Request, code: str, message: str, status: int | None = None, retry_after_s: float = 0.0
) -> Response:
    """Build a response with an `ErrorReply`. ``retry_after_s``: sent as ``Retry-After`` unless 0."""
    chosen = STATUS_OF_CODE.get(code, 400) if status is None else status
    return reply(request, ErrorReply(code=code, message=message), chosen, refusal_headers(chosen, retry_after_s))


def refusal_headers(status: int, retry_after_s: float = 0.0) -> dict[str, str]:
    """Headers of an error response."""
    headers: dict[str, str] = {}
    if status in (401, 408, 413, 415, 429):  # the request's body is left unread, so the connection cannot be reused
        headers["connection"] = "close"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if retry_after_s:
        headers["retry-after"] = str(math.ceil(retry_after_s))
    return headers


def retry_after(headers: Mapping[str, str]) -> float:
    """The ``Retry-After`` header in seconds; 0.0 if there is none, or it is a date."""
    text = headers.get("retry-after", "")
    return float(text) if text.isdecimal() and len(text) < 6 else 0.0


async def body_of(request: Request, limit: int) -> bytes:
    """Read the request's body. Raises `DeviceRefusedError` over ``limit`` bytes or `BODY_TIMEOUT_S`."""
    try:
        return await within(BODY_TIMEOUT_S, _read_body(request, limit))
    except asyncio.TimeoutError as error:
        raise DeviceRefusedError(f"the body took over the limit of {BODY_TIMEOUT_S:g} s", "too-slow") from error


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
    """Exception handlers for any server. ``refuse`` builds the response, like `refusal`."""

    async def on_http_exception(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 400
        code = {404: "not-found", 405: "method-not-allowed"}.get(status, "refused")
        return refuse(request, code, f"{request.method} {request.url.path[:200]}: {code.replace('-', ' ')}", status)

    async def on_disconnect(_request: Request, _gone: Exception) -> Response:
        return Response(status_code=400)  # the client is gone

    async def on_fault(request: Request, _fault: Exception) -> Response:
        return refuse(request, "internal", "internal error: see the server's log", 500)

    return {HTTPException: on_http_exception, ClientDisconnect: on_disconnect, Exception: on_fault}


EXCEPTION_HANDLERS: Final[Mapping[Any, Handler]] = {
    WireError: _on_wire_error,
    DeviceRefusedError: _on_refused,
    CoordinatorRefusedError: _on_refused,
    DeviceFailedError: _on_failed,
    **faults_as(refusal),
}
"""Exception handlers of a Starlette application."""
