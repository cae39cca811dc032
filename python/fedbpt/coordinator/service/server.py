"""`CoordinatorServer`: the coordinator's HTTP server and its mailboxes."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.routing import Route

from fedbpt.coordinator.clients.mailbox import MailboxClient, PostOffice
from fedbpt.coordinator.devices.enrolment import DeviceRegistry
from fedbpt.coordinator.service.http import DEVICE_LIMIT, GUESS_LIMIT, build_app
from fedbpt.net.server import HttpServer
from fedbpt.net.tls import Tls, is_loopback


class CoordinatorServer(HttpServer):
    """Serves the devices of ``registry`` that call in, in a thread (``start``); see `HttpServer`.

    ``more``: other routes of the same server.
    """

    def __init__(
        self,
        registry: DeviceRegistry,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        tls: Tls | None = None,
        allow_insecure: bool = False,
        device_limit: tuple[float, int] = DEVICE_LIMIT,
        guess_limit: tuple[float, int] = GUESS_LIMIT,
        more: Sequence[Route] = (),
    ) -> None:
        self.office = PostOffice()
        reached_as = host if is_loopback(host) and not (tls and tls.serves) else None
        app = build_app(registry, self.office, device_limit, guess_limit, reached_as, more)
        super().__init__(app, host, port, tls=tls, allow_insecure=allow_insecure, on_exit=self.office.close)

    def present(self) -> list[str]:
        """Names of the devices that call in now, sorted."""
        return self.office.present()

    def client(self, device: str) -> MailboxClient:
        """A client of ``device``, for any event loop while the server runs."""
        return self.office.client(device)
