"""`Guard`: who may open the dashboard, which can stop a run.

A browser sends a token as a cookie, which it gets for the link that the command prints. Whatever another web page makes
the browser send is refused by its origin: browsers let any page open a WebSocket to any server.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from http.cookies import SimpleCookie
from typing import Final
from urllib.parse import parse_qs, urlsplit

from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from fedbpt.net import tokens
from fedbpt.net.auth import GUESSES, wrong_name
from fedbpt.net.bodies import STATUS_OF_CODE
from fedbpt.net.rate_limit import RateLimit

COOKIE: Final = "fedbpt-dashboard"


class Guard:
    """ASGI middleware. ``token`` None: it answers under loopback's names alone. Refuses in plain text.

    ``visited``: called at each request that is let through.
    """

    def __init__(self, app: ASGIApp, token: str | None, visited: Callable[[], None] = lambda: None) -> None:
        self._app = app
        self._visited = visited
        self._digest = None if token is None else tokens.digest(token)
        self._guesses = RateLimit(*GUESSES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        answer = self._answer(HTTPConnection(scope))
        if answer is None:
            self._visited()
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await answer(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008, "reason": "refused"})

    def _answer(self, connection: HTTPConnection) -> Response | None:
        """A refusal, or a redirection; None: let it through."""
        if self._digest is None and (problem := wrong_name(connection, "127.0.0.1")):
            return _refused("wrong-host", problem)
        origin = connection.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != connection.headers.get("host"):
            return _refused("unauthorized", "another web page may not use this dashboard")
        if self._digest is None or self._is_known(connection):
            return None
        given = parse_qs(connection.scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]
        if connection.scope["type"] == "http" and tokens.matches(given, self._digest):
            answer = RedirectResponse(connection.url.path, status_code=303)
            secure = connection.url.scheme == "https"
            answer.set_cookie(COOKIE, given, httponly=True, samesite="strict", secure=secure)
            return answer
        wait_s = self._guesses.take(connection.client.host if connection.client else "")
        if wait_s:
            return _refused("too-many", "too many requests without the token", wait_s)
        return _refused("unauthorized", "open the link that the command printed: it ends in ?token=…")

    def _is_known(self, connection: HTTPConnection) -> bool:
        cookies = SimpleCookie(connection.headers.get("cookie", ""))
        given = [tokens.bearer(connection.headers), cookies[COOKIE].value if COOKIE in cookies else ""]
        return any(tokens.matches(secret, self._digest) for secret in given if secret and self._digest)


def _refused(code: str, message: str, retry_after_s: float = 0.0) -> Response:
    headers = {"retry-after": str(math.ceil(retry_after_s))} if retry_after_s else {}
    return PlainTextResponse(f"{message}\n", STATUS_OF_CODE[code], headers)
