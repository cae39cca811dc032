"""Who is answered: `RequireToken`, who sends a server's one token; `LoopbackOnly`, who calls it by loopback's names.

A server that other machines reach asks for a token: `check_token`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from fedbpt import tokens
from fedbpt.errors import ConfigError
from fedbpt.http_bodies import refusal
from fedbpt.rate_limit import RateLimit
from fedbpt.tls import is_loopback

OPEN_PATHS: Final = frozenset({"/health", "/healthz"})
"""For everybody, with a token or without."""

GUESSES: Final = (1.0, 10)
"""Requests without the right token that an address may make: a second, and at once."""


def check_token(token: str | None, host: str, option: str) -> None:
    """Raises `ConfigError` where other machines reach ``host`` and ``option``, a file with a token, was not given."""
    if token is None and not is_loopback(host):
        raise ConfigError(
            f"{host} can be reached from other machines: ask for a token ({option} FILE), or serve on 127.0.0.1"
        )


class RequireToken:
    """ASGI middleware: 401 without the token, 429 where an address guesses on; `OPEN_PATHS` are for everybody."""

    def __init__(self, app: ASGIApp, token: str, who: str, refuse: Callable[..., Response] = refusal) -> None:
        self._app = app
        self._who = who
        self._refuse = refuse
        self._digest = tokens.digest(token)
        self._guesses = RateLimit(*GUESSES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            request = Request(scope)
            if not tokens.matches(tokens.bearer(request.headers), self._digest):
                wait_s = self._guesses.take(request.client.host if request.client else "")
                if wait_s:
                    answer = self._refuse(
                        request, "too-many", "too many requests without the token", retry_after_s=wait_s
                    )
                else:
                    answer = self._refuse(request, "unauthorized", f"{self._who} asks for its token")
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)


class LoopbackOnly:
    """ASGI middleware: 421 under any other name, for a web page may give its own name our address (DNS rebinding)."""

    def __init__(self, app: ASGIApp, refuse: Callable[..., Response] = refusal) -> None:
        self._app = app
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            request = Request(scope)
            if not is_loopback(host_of(request)):
                answer = self._refuse(request, "wrong-host", "without a token this is for 127.0.0.1 and localhost")
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)


def host_of(connection: HTTPConnection) -> str:
    """The name under which the server was asked, without port; empty: it makes no sense."""
    try:
        return urlsplit(f"//{connection.headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""
