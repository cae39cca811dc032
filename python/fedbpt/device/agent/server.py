"""`AgentServer`: a device's HTTP server."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.types import ASGIApp

from fedbpt.device.agent.http import build_app
from fedbpt.device.agent.service import AgentService
from fedbpt.errors import ConfigError
from fedbpt.net.auth import OwnNames
from fedbpt.net.server import HttpServer
from fedbpt.net.tls import Tls, is_loopback
from fedbpt.plain_text import echo

log = logging.getLogger(__name__)


def announce(url: str) -> None:
    """Print ``{"ready": {"url": ...}}`` on one line, for a parent process that needs the port."""
    parts = urlsplit(url)
    echo(json.dumps({"ready": {"host": parts.hostname, "port": parts.port, "url": url}}))


def serve(
    service: AgentService,
    host: str = "127.0.0.1",
    port: int = 8401,
    *,
    on_ready: Callable[[str], None] = announce,
    allow_insecure: bool = False,
) -> None:
    """Serve until Ctrl-C or SIGTERM, then cancel the work and return. Raises as `AgentServer` does."""
    AgentServer(service, host, port, on_ready=on_ready, allow_insecure=allow_insecure).run()


class AgentServer(HttpServer):
    """Serves ``service``; see `HttpServer`. ``token``: the secret that every request must carry.

    Also raises `ConfigError` for an address beyond loopback with TLS but neither a token nor client certificates.
    """

    def __init__(
        self,
        service: AgentService,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        tls: Tls | None = None,
        token: str | None = None,
        on_ready: Callable[[str], None] = lambda _url: None,
        allow_insecure: bool = False,
    ) -> None:
        tls = tls or Tls()
        if tls.serves and not (token or tls.client_certs or allow_insecure or is_loopback(host)):
            raise ConfigError(
                f"anyone who reaches {host} could use this device: set a token (--token-file), require client"
                " certificates (--ca, --client-certs), or use --allow-insecure on a network you trust",
                field="token",
            )
        self.service = service
        app: ASGIApp = build_app(service, token)
        if token is None and not tls.serves:  # against DNS rebinding; with TLS, a foreign name fails certificate checks
            app = OwnNames(app, host)
        super().__init__(
            app, host, port, tls=tls, allow_insecure=allow_insecure, on_ready=on_ready, on_exit=service.stop
        )

    def serve(self) -> None:
        try:
            super().serve()
        finally:
            if not self.service.close():
                log.warning("the device's work did not stop in time and will end with the process")
