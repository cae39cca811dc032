"""Who is answered: `RequireToken`, who sends a server's one token; `OwnNames`, who calls it by a name of its own.

A server that other machines reach asks for a token: `check_token`.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from functools import lru_cache
from typing import Final
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from fedbpt.errors import ConfigError
from fedbpt.net import tokens
from fedbpt.net.bodies import refusal
from fedbpt.net.rate_limit import RateLimit
from fedbpt.net.tls import is_loopback

OPEN_PATHS: Final = frozenset({"/health", "/healthz"})
"""For everybody, with a token or without."""
LOCAL_ZONES: Final = frozenset({"local", "localhost", "localdomain", "internal", "lan", "test"})
"""Top-level domains that nobody can register in (RFC 6761, RFC 6762, ICANN 2024; ``lan`` is not delegated)."""

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


class OwnNames:
    """ASGI middleware: 421 under a name that a stranger may own. A web page can give its own name our address, and then
    read our answers as if they were its own (DNS rebinding).

    ``host``: what the server is bound to. On loopback, only loopback's names are answered; else see `is_local_name`.
    """

    def __init__(self, app: ASGIApp, host: str, refuse: Callable[..., Response] = refusal) -> None:
        self._app = app
        self._host = host
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            request = Request(scope)
            if problem := wrong_name(request, self._host):
                await self._refuse(request, "wrong-host", problem)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class LoopbackOnly(OwnNames):
    """`OwnNames` of a server on loopback."""

    def __init__(self, app: ASGIApp, refuse: Callable[..., Response] = refusal) -> None:
        super().__init__(app, "127.0.0.1", refuse)


def wrong_name(connection: HTTPConnection, host: str) -> str:
    """Why a server bound to ``host`` is not to answer under the name that ``connection`` asks for; empty: it may."""
    name = host_of(connection)
    if is_loopback(host):
        return "" if is_loopback(name) else "without a token this is for 127.0.0.1 and localhost"
    if name == host or is_local_name(name):
        return ""
    return "without a token this answers under its address, or its name on the local network"


def is_local_name(name: str) -> bool:
    """Whether no stranger can own ``name``: an address, a name without a dot, of a local zone, or this machine's."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        zone = name.rpartition(".")[2]
        return bool(name) and (zone == name or zone in LOCAL_ZONES or name.endswith(".home.arpa") or name == _fqdn())
    return True


@lru_cache(maxsize=1)
def _fqdn() -> str:
    return socket.getfqdn().lower()


def host_of(connection: HTTPConnection) -> str:
    """The name under which the server was asked, without port; empty: it makes no sense."""
    try:
        return urlsplit(f"//{connection.headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""
