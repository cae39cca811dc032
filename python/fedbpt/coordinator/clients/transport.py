"""`Transport`: one request to a device, and its reply. What a request means, `RemoteDevice` knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from fedbpt.protocol.polling import Method

IN_REACH: Final = "is it running and in reach?"


class Response(NamedTuple):
    """A device's reply; ``kind``: its content's type."""

    status: int
    kind: str
    content: bytes
    retry_after_s: float = 0.0


class NoReplyError(Exception):
    """There was no reply, for a reason in words. ``begun``: the request was in the device's hands, or may have been."""

    def __init__(self, reason: str, *, begun: bool = False) -> None:
        super().__init__(reason)
        self.begun = begun


class Transport(Protocol):
    """How requests reach one device. A request that is sent again does no harm."""

    where: str
    """Where the device is, for people."""

    holds_plans: bool
    """A plan may be held until its report is there, so that a round is one exchange."""

    async def send(
        self, method: Method, path: str, body: bytes | None, read_s: float, taken: Callable[[], None]
    ) -> Response:
        """The reply, within ``read_s`` seconds and what the network takes. ``taken``: called when the device has it.

        Raises `NoReplyError`; `WireError` for a body that is over the limit.
        """
        ...

    async def answers(self, timeout_s: float) -> bool:
        """Whether the device can be reached within ``timeout_s`` seconds."""
        ...

    async def aclose(self) -> None:
        """Let go of connections. The transport may be used again, also from another event loop."""
        ...

    def twin(self) -> Transport:
        """Another transport to this device, with connections of its own: for another event loop."""
        ...
