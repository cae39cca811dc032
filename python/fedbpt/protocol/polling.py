"""Messages of the mailbox, by which a device behind NAT is served: it polls for HTTP requests and posts the responses.

The device's own routes (`fedbpt.device.agent.http`) handle each request. A poll lists the requests that the device
holds; any other pending request is delivered again. So there are no acknowledgements, and a lost message or a restart
of either side only costs a repetition.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

import msgspec

from fedbpt.protocol import codec
from fedbpt.protocol.specs import Message, Name

POLL_PATH: Final = "/v1/mailbox/poll"
REPLY_PATH: Final = "/v1/mailbox/replies/{id}"
ENROL_PATH: Final = "/v1/enrol"

MAX_HELD: Final = 64
"""Most requests that a device holds at once."""

MAX_ENVELOPE_BYTES: Final = codec.MAX_BODY_BYTES + 2**20
"""Largest `Reply` or `Delivery`, bytes: a body and its envelope."""

POLL_S: Final = (4.0, 25.0)
"""Shortest and longest time that an idle poll is held open, seconds. A dead connection is noticed when its poll should
have ended; the longest is below the 60 s after which NATs and proxies drop an idle connection.
"""

POLL_S_PER_DEVICE: Final = 0.004
"""Added hold per device, which bounds the fleet to 250 polls a second: a tenth of one coordinator core."""

CALL_S_PER_DEVICE: Final = 0.006
"""Where that would exceed the longest hold, devices are told when to call: after so long per device. A call opens a
connection, and costs more than a poll.
"""

MAX_PAUSE_S: Final = 600.0
"""Longest time after which a device calls again, whatever it was told."""


def poll_s(n_devices: int) -> float:
    """How long to hold an idle poll in a fleet of ``n_devices``, seconds."""
    shortest, longest = POLL_S
    return min(max(n_devices * POLL_S_PER_DEVICE, shortest), longest)


def call_s(n_devices: int) -> float:
    """After how many seconds an idle device is to call again; 0: so few ``n_devices`` are held (`poll_s`)."""
    if n_devices * POLL_S_PER_DEVICE <= POLL_S[1]:
        return 0.0
    return min(n_devices * CALL_S_PER_DEVICE, MAX_PAUSE_S)


RequestId: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
Path: TypeAlias = Annotated[str, msgspec.Meta(max_length=1024, pattern=r"^/v1/[A-Za-z0-9._~%/?=&-]*\Z")]

Method: TypeAlias = Literal["GET", "POST", "DELETE"]

PACED_HEADER: Final = "fedbpt-paced"
"""Header of a poll by a device that obeys ``Retry-After`` in the response to it. Devices of earlier
versions, and devices while they work, do not send it, and are never told when to call: their polls are held."""


class Poll(Message, frozen=True):
    """Ask for work. ``holding``: requests that were delivered and have no reply yet."""

    holding: Annotated[tuple[RequestId, ...], msgspec.Meta(max_length=MAX_HELD)] = ()
    wait_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 0.0  # how long to hold the poll while there is no request
    protocol: Literal[1] = 1


class Request(Message, frozen=True):
    """A request to the device's routes."""

    id: RequestId
    method: Method
    path: Path
    body: bytes = b""


class Delivery(Message, frozen=True):
    """The response to a `Poll`; empty if no request came in time. ``wait_s``: for the next poll.

    With ``Retry-After``, which only an empty one has, the next poll is not due before (pace steering).
    """

    requests: tuple[Request, ...] = ()
    wait_s: Annotated[float, msgspec.Meta(ge=0)] = POLL_S[0]
    protocol: Literal[1] = 1


class Reply(Message, frozen=True):
    """The device's response to one `Request`."""

    status: Annotated[int, msgspec.Meta(ge=200, le=599)]
    content_type: Annotated[str, msgspec.Meta(max_length=128)] = ""
    body: bytes = b""
    protocol: Literal[1] = 1


class Enrolment(Message, frozen=True):
    """A one-time code and the SHA-256 of the token that the device generated; the token itself is not sent yet."""

    code: Annotated[str, msgspec.Meta(max_length=64)]
    token_digest: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    protocol: Literal[1] = 1


class Enrolled(Message, frozen=True):
    """The name that the device was invited under."""

    device: Name
    protocol: Literal[1] = 1
