"""`call`: one request to an ASGI application in this process, without a server and without a URL."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import unquote

from starlette.types import ASGIApp, Message


class AsgiResponse(NamedTuple):
    """A response; the names of ``headers`` are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


async def call(app: ASGIApp, method: str, target: str, body: bytes, headers: Mapping[str, str]) -> AsgiResponse:
    """The response of ``app`` to a request for ``target``, a path with its query, percent-encoded.

    Raises what ``app`` raises. https://asgi.readthedocs.io/en/latest/specs/www.html
    """
    path, _, query = target.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "client": None,
        "server": None,
    }
    requests: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    status = 500
    found: dict[str, str] = {}
    content = bytearray()

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await asyncio.Event().wait()  # the caller does not disconnect
        raise AssertionError("unreachable")

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            found.update({name.decode().lower(): value.decode() for name, value in message.get("headers", ())})
        elif message["type"] == "http.response.body":
            content.extend(message.get("body", b""))

    await app(scope, receive, send)
    return AsgiResponse(status, found, bytes(content))
