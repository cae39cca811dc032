"""Access control of servers: `RequireToken` checks a token, `OwnNames` the ``Host`` header.

A server that other machines can reach must require a token: `check_token`.
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
"""Paths that need no token."""
LOCAL_ZONES: Final = frozenset({"local", "localhost", "localdomain", "internal", "lan", "test"})
"""Top-level domains without registrations (RFC 6761, RFC 6762, ICANN 2024; ``lan`` is not delegated)."""

GUESSES: Final = (1.0, 10)
"""Rate limit of requests without the right token, per address: per second, and burst."""


def check_token(token: str | None, host: str, option: str) -> None:
    """Raise `ConfigError` if other machines can reach ``host`` and there is no token, which ``option`` gives."""
    if token is None and not is_loopback(host):
        raise ConfigError(
            f"{host} can be reached from other machines: require a token ({option} FILE), or serve on 127.0.0.1",
            field=option,
        )


class RequireToken:
    """ASGI middleware: 401 without the token, 429 over the rate limit `GUESSES`; `OPEN_PATHS` need no token."""

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
                    response = self._refuse(
                        request, "too-many", "too many requests without the token", retry_after_s=wait_s
                    )
                else:
                    response = self._refuse(request, "unauthorized", f"{self._who} requires its token")
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


class OwnNames:
    """ASGI middleware against DNS rebinding: 421 for a ``Host`` that others may own, since a web page could resolve its
    own name to this server's address and then read its responses as same-origin.

    ``host``: the address that the server is bound to. On loopback, only loopback names are allowed; else see
    `is_local_name`.
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
    """`OwnNames` for a server on loopback."""

    def __init__(self, app: ASGIApp, refuse: Callable[..., Response] = refusal) -> None:
        super().__init__(app, "127.0.0.1", refuse)


def wrong_name(connection: HTTPConnection, host: str) -> str:
    """Why a server bound to ``host`` must refuse the name in ``connection``'s ``Host`` header; empty if it need not."""
    name = host_of(connection)
    if is_loopback(host):
        return "" if is_loopback(name) else "without a token, use 127.0.0.1 or localhost"
    if name == host or is_local_name(name):
        return ""
    return "without a token, use this server's address or its name on the local network"


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
    """The name in the ``Host`` header, without port; empty if it is missing or invalid."""
    try:
        return urlsplit(f"//{connection.headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""
