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
from fedbpt.serving.http import build_app
from fedbpt.serving.models import ServedModel
from fedbpt.serving.scheduler import Scheduler

SEND_BUFFER_BYTES: Final = 2**16
"""Size of a connection's send buffer. A client that stops reading is noticed once it is full."""


class ModelServer(HttpServer):
    """Serves models over HTTP.

    Args:
        models: by name.
        host, port: see `HttpServer`.
        token: the API key that every request must send; None: loopback only.
        origins: origins of web pages that may call it from a browser (CORS), like ``https://app.example``; ``*``: all.
        tls, allow_insecure, on_ready: see `HttpServer`.

    Raises:
        ConfigError: a host beyond loopback without a token, an invalid origin, or as `HttpServer`.
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
        scheduler = Scheduler()
        app = build_app(models, scheduler, token, [checked_origin(origin) for origin in origins])
        super().__init__(
            app, host, port, tls=tls, allow_insecure=allow_insecure, on_ready=on_ready, on_exit=scheduler.stop
        )
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)


def checked_origin(origin: str) -> str:
    """Return ``origin`` if it is ``*`` or a web page's origin as browsers send it. Raises `ConfigError`."""
    try:
        parts = urlsplit(origin)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and "@" not in parts.netloc
    except ValueError:
        valid = False
    if origin != "*" and not (valid and origin == f"{parts.scheme}://{parts.netloc}".lower()):
        raise ConfigError(f"invalid origin {origin!r}: give one like https://app.example, or *", field="--cors")
    return origin
