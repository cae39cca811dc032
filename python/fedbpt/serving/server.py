"""`ModelServer`: the OpenAI-compatible server of one model and its tuned prompts."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Final
from urllib.parse import urlsplit

from fedbpt.errors import ConfigError
from fedbpt.net.auth import check_token
from fedbpt.net.server import HttpServer
from fedbpt.net.tls import Tls
from fedbpt.serving.answers import ServedModel
from fedbpt.serving.desk import Desk
from fedbpt.serving.http import build_app

SEND_BUFFER_BYTES: Final = 2**16
"""Of a connection, in the system: some hundred pieces. A client that reads no more is noticed when it is full."""


class ModelServer(HttpServer):
    """Serves ``models``, by name; see `HttpServer`.

    Args:
        token: what every request must bring, as OpenAI's API key.
        origins: of web pages that may call it from a browser (CORS), like ``https://app.example``; ``*``: of all.

    Raises also ConfigError: beyond loopback without a token, anyone could use it; what is no origin.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        token: str | None = None,
        origins: Sequence[str] = (),
        tls: Tls | None = None,
        allow_insecure: bool = False,
        on_ready: Callable[[str], None] = lambda _url: None,
    ) -> None:
        check_token(token, host, "--token-file")
        desk = Desk()
        app = build_app(models, desk, token, [checked_origin(origin) for origin in origins])
        super().__init__(app, host, port, tls=tls, allow_insecure=allow_insecure, on_ready=on_ready, on_exit=desk.stop)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)


def checked_origin(origin: str) -> str:
    """Raises `ConfigError` for what no browser sends as a page's origin."""
    try:
        parts = urlsplit(origin)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and "@" not in parts.netloc
    except ValueError:
        known = False
    if origin != "*" and not (known and origin == f"{parts.scheme}://{parts.netloc}".lower()):
        raise ConfigError(f"{origin!r} is no origin of web pages: give one like https://app.example, or *")
    return origin
