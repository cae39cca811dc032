"""`Transport`: one request to a device, and its response. What a request means, `TransportClient` knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from fedbpt.protocol.polling import Method

IN_REACH: Final = "is it running and in reach?"


class Response(NamedTuple):
    """A device's response. ``content_type``: the header, empty without one."""

    status: int
    content_type: str
    content: bytes
    retry_after_s: float = 0.0


class NoResponseError(Exception):
    """There was no response; the message says why. ``begun``: the device has the request, or may have it."""

    def __init__(self, reason: str, *, begun: bool = False) -> None:
        super().__init__(reason)
        self.begun = begun


class Transport(Protocol):
    """How requests reach one device. A request may be sent again: it has no further effect."""

    where: str
    """Where the device is, as shown to people."""

    holds_plans: bool
    """The request with a plan may be held until its report is there, so that a round takes one exchange."""

    sends_short: bool
    """Short plans and reports (`fedbpt.search.compact_plans`) save more than they cost."""

    async def send(
        self, method: Method, path: str, body: bytes | None, timeout_s: float, delivered: Callable[[], None]
    ) -> Response:
        """The response to a request, within ``timeout_s`` seconds and the time that the network takes.

        ``delivered``: called when the device has the request, from any thread.

        Raises:
            NoResponseError: there was none in time.
            WireError: its body is over the limit.
        """
        ...

    async def aclose(self) -> None:
        """Close the connections. The transport may be used again, also from another event loop."""
        ...


class RemoteTransport(Transport, Protocol):
    """A transport to a device outside this process."""

    async def responds(self, timeout_s: float) -> bool:
        """Whether the device responds within ``timeout_s`` seconds."""
        ...

    def twin(self) -> RemoteTransport:
        """Another transport to the same device, with its own connections, for another event loop."""
        ...
