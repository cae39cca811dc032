"""`ModelServer`: the OpenAI-compatible server of one model and its tuned prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedbpt.http_auth import check_token
from fedbpt.http_server import HttpServer
from fedbpt.serving.answers import ServedModel
from fedbpt.serving.desk import Desk
from fedbpt.serving.http import build_app
from fedbpt.tls import Tls


class ModelServer(HttpServer):
    """Serves ``models``, by name; see `HttpServer`. ``token``: what every request must bring, as OpenAI's API key.

    Raises also ConfigError: beyond loopback without a token, anyone could use it.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        allow_insecure: bool = False,
        on_ready: Callable[[str], None] = lambda _url: None,
    ) -> None:
        check_token(token, host, "--token-file")
        desk = Desk()
        app = build_app(models, desk, token)
        super().__init__(app, host, port, tls=tls, allow_insecure=allow_insecure, on_ready=on_ready, on_exit=desk.stop)
