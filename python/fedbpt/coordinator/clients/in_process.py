"""`InProcessClient`: a device in this process, for simulation, tuning on one machine, and tests.

Requests go to the device's routes as over HTTP, and through the same bytes: what cannot be encoded fails here too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from starlette.applications import Starlette

from fedbpt.coordinator.clients.requests import TransportClient
from fedbpt.coordinator.clients.transport import Response
from fedbpt.device.agent.http import build_app
from fedbpt.device.agent.service import AgentService, LocalDevice
from fedbpt.device.agent.worker import Worker
from fedbpt.net import asgi
from fedbpt.net.bodies import retry_after
from fedbpt.protocol import codec
from fedbpt.protocol.polling import Method

POLL_S: Final = 0.5
"""How long a poll is held, which is also how often progress is reported."""

_HEADERS: Final = {"accept": codec.CONTENT_TYPE, "content-type": codec.CONTENT_TYPE}


class InProcessClient(TransportClient):
    """Reaches ``device`` through an `AgentService`. See `DeviceClient` for the methods.

    ``worker``: shared between devices that share a scorer; None: a thread for this device.
    """

    def __init__(self, device: LocalDevice, name: str | None = None, worker: Worker | None = None) -> None:
        transport = InProcessTransport(device, worker)
        super().__init__(transport, name or device.name, retry_s=0.0, poll_s=POLL_S)
        self._transport: InProcessTransport = transport

    @property
    def service(self) -> AgentService:
        return self._transport.service


class InProcessTransport:
    """Calls the routes of ``device``. The service belongs to one event loop, from the first request to `aclose`."""

    where = "in this process"
    holds_plans = False
    sends_short = False

    def __init__(self, device: LocalDevice, worker: Worker | None = None) -> None:
        self._device = device
        self._worker = worker
        self._served: tuple[AgentService, Starlette] | None = None

    @property
    def service(self) -> AgentService:
        return self._serve()[0]

    def _serve(self) -> tuple[AgentService, Starlette]:
        if self._served is None:
            service = AgentService(self._device, self._worker)
            self._served = service, build_app(service)
        return self._served

    async def send(
        self,
        method: Method,
        path: str,
        body: bytes | None,
        timeout_s: float,  # noqa: ARG002 - the routes hold a request no longer than it says
        delivered: Callable[[], None] = lambda: None,  # noqa: ARG002
    ) -> Response:
        _, app = self._serve()
        response = await asgi.call(app, method, path, body or b"", _HEADERS)
        content_type = response.headers.get("content-type", "")
        return Response(response.status, content_type, response.body, retry_after(response.headers))

    async def aclose(self) -> None:
        if self._served is not None:
            (service, _), self._served = self._served, None
            service.stop()
            await asyncio.to_thread(service.close)
