"""`RemoteDevice`: a device outside this process."""

from __future__ import annotations

import copy
from typing import TypeVar

from fedbpt.coordinator.clients.requests import POLL_S, RESPONSE_S, RETRY_S, TransportClient
from fedbpt.coordinator.clients.transport import RemoteTransport

D = TypeVar("D", bound="RemoteDevice")


class RemoteDevice(TransportClient):
    """A `TransportClient` that can be probed, and copied for another event loop."""

    def __init__(
        self,
        transport: RemoteTransport,
        name: str,
        retry_s: float = RETRY_S,
        response_s: float = RESPONSE_S,
        poll_s: float = POLL_S,
    ) -> None:
        super().__init__(transport, name, retry_s, response_s, poll_s)
        self._transport: RemoteTransport = transport

    async def responds(self, timeout_s: float) -> bool:
        """Whether the device responds within ``timeout_s`` seconds; tried once."""
        return await self._transport.responds(timeout_s)

    def twin(self: D) -> D:
        """Another client of the same device, with its own connections and counts, for another event loop."""
        made = copy.copy(self)
        made._transport = self._transport.twin()
        made.bytes_up = made.bytes_down = 0
        made._plan = None
        made._known = {}
        return made
