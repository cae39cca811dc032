"""`Guard`: decides who may open the dashboard, and who may control the run.

There are two links: the operator's, and a read-only one. Only the operator's page is built with controls, and NiceGUI
accepts events only for elements of a page whose random id the sender knows.

The link's token is exchanged for a cookie. Requests that another web page makes a browser send are rejected by their
origin, because browsers let any page open a WebSocket to any server.
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

_MAY_CONTROL: Final = "fedbpt.may-control"


def may_control(scope: MutableMapping[str, Any]) -> bool:
    """Whether the sender of a request that passed a `Guard` may control the run."""
    return scope.get(_MAY_CONTROL) is True


class Guard:
    """ASGI middleware that authorizes requests. Responds with plain text to those it rejects.

    Args:
        app: the application to protect.
        token: senders of it may control the run, senders of its `fedbpt.net.tokens.watch_token` may only watch. None:
            only requests to loopback's names are served, and all may control.
        on_visit: called at each request that passes.
    """

    def __init__(self, app: ASGIApp, token: str | None, on_visit: Callable[[], None] = lambda: None) -> None:
        self._app = app
        self._on_visit = on_visit
        self._control_digest = None if token is None else tokens.digest(token)
        self._watch_digest = None if token is None else tokens.digest(tokens.watch_token(token))
        self._guesses = RateLimit(*GUESSES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        response = self._intercept(HTTPConnection(scope))
        if response is None:
            self._on_visit()
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await response(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008, "reason": "refused"})

    def _intercept(self, connection: HTTPConnection) -> Response | None:
        """A refusal or redirection; None: let the request pass."""
        if self._control_digest is None and (problem := wrong_name(connection, "127.0.0.1")):
            return _refused("wrong-host", problem)
        origin = connection.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != connection.headers.get("host"):
            return _refused("unauthorized", "requests from another web page are rejected: open the dashboard itself")
        given = parse_qs(connection.scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]
        if connection.scope["type"] == "http" and self._matches(given):  # replaces a cookie of the other token
            response = RedirectResponse(connection.url.path, status_code=303)
            secure = connection.url.scheme == "https"
            response.set_cookie(COOKIE, given, httponly=True, samesite="strict", secure=secure)
            return response
        if self._control_digest is None:
            connection.scope[_MAY_CONTROL] = True
            return None
        if self._is_authorized(connection):
            connection.scope[_MAY_CONTROL] = self._is_authorized(connection, self._control_digest)
            return None
        wait_s = self._guesses.take(connection.client.host if connection.client else "")
        if wait_s:
            return _refused("too-many", "too many requests without a valid token: try again later", wait_s)
        return _refused("unauthorized", "open the link that the command printed: it ends in ?token=…")

    def _matches(self, secret: str, digest: bytes | None = None) -> bool:
        """Whether ``secret`` is the token of ``digest``; None: either token."""
        digests = (self._control_digest, self._watch_digest) if digest is None else (digest,)
        return any(tokens.matches(secret, each) for each in digests if each is not None)

    def _is_authorized(self, connection: HTTPConnection, digest: bytes | None = None) -> bool:
        cookies = SimpleCookie(connection.headers.get("cookie", ""))
        given = [tokens.bearer(connection.headers), cookies[COOKIE].value if COOKIE in cookies else ""]
        return any(self._matches(secret, digest) for secret in given if secret)


def _refused(code: str, message: str, retry_after_s: float = 0.0) -> Response:
    headers = {"retry-after": str(math.ceil(retry_after_s))} if retry_after_s else {}
    return PlainTextResponse(f"{message}\n", STATUS_OF_CODE[code], headers)
