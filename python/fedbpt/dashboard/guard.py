"""`Guard`: who may open the dashboard, and who of them may stop the run.

There are two links: the operator's, and one for those who watch. A page is built with controls for the operator alone,
and NiceGUI takes events only for elements of a page whose random id the sender knows.

A browser sends a token as a cookie, which it gets for the link that the command prints. Whatever another web page makes
the browser send is refused by its origin: browsers let any page open a WebSocket to any server.
"""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping
from http.cookies import SimpleCookie
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from fedbpt.net import tokens
from fedbpt.net.auth import GUESSES, wrong_name
from fedbpt.net.bodies import STATUS_OF_CODE
from fedbpt.net.rate_limit import RateLimit

COOKIE: Final = "fedbpt-dashboard"

_STEERS: Final = "fedbpt.steers"


def may_steer(scope: MutableMapping[str, Any]) -> bool:
    """Whether who sent a request that came through a `Guard` may steer the run."""
    return scope.get(_STEERS) is True


class Guard:
    """ASGI middleware. ``token`` None: it answers under loopback's names alone, and everybody steers; else who sends it
    steers, and who sends `fedbpt.net.tokens.watch_token` of it watches. Refuses in plain text.

    ``visited``: called at each request that is let through.
    """

    def __init__(self, app: ASGIApp, token: str | None, visited: Callable[[], None] = lambda: None) -> None:
        self._app = app
        self._visited = visited
        self._steers = None if token is None else tokens.digest(token)
        self._watches = None if token is None else tokens.digest(tokens.watch_token(token))
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
        if self._steers is None and (problem := wrong_name(connection, "127.0.0.1")):
            return _refused("wrong-host", problem)
        origin = connection.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != connection.headers.get("host"):
            return _refused("unauthorized", "another web page may not use this dashboard")
        given = parse_qs(connection.scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]
        if connection.scope["type"] == "http" and self._is_right(given):  # also where a cookie has the other token
            answer = RedirectResponse(connection.url.path, status_code=303)
            secure = connection.url.scheme == "https"
            answer.set_cookie(COOKIE, given, httponly=True, samesite="strict", secure=secure)
            return answer
        if self._steers is None or self._is_known(connection):
            connection.scope[_STEERS] = self._steers is None or self._is_known(connection, self._steers)
            return None
        wait_s = self._guesses.take(connection.client.host if connection.client else "")
        if wait_s:
            return _refused("too-many", "too many requests without the token", wait_s)
        return _refused("unauthorized", "open the link that the command printed: it ends in ?token=…")

    def _is_right(self, secret: str, digest: bytes | None = None) -> bool:
        """Of ``digest``; None: of either token."""
        digests = (self._steers, self._watches) if digest is None else (digest,)
        return any(tokens.matches(secret, each) for each in digests if each is not None)

    def _is_known(self, connection: HTTPConnection, digest: bytes | None = None) -> bool:
        cookies = SimpleCookie(connection.headers.get("cookie", ""))
        given = [tokens.bearer(connection.headers), cookies[COOKIE].value if COOKIE in cookies else ""]
        return any(self._is_right(secret, digest) for secret in given if secret)


def _refused(code: str, message: str, retry_after_s: float = 0.0) -> Response:
    headers = {"retry-after": str(math.ceil(retry_after_s))} if retry_after_s else {}
    return PlainTextResponse(f"{message}\n", STATUS_OF_CODE[code], headers)
