"""What a device that calls in exchanges with its coordinator: HTTP requests and replies, the other way round.

The device polls for requests, each of which its own routes answer (`fedbpt.device.agent.http`), and posts the replies.
A poll names the requests that the device has in hand; what it should have and does not name is handed over again. So
nothing is acknowledged, and a lost answer, or a restart of either side, costs a repetition.
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
"""Most requests that a device has in hand at once."""

MAX_ENVELOPE_BYTES: Final = codec.MAX_BODY_BYTES + 2**20
"""Largest `Reply` or `Delivery`: a body and what is around it."""

POLL_S: Final = (4.0, 25.0)
"""Shortest and longest that a poll is held open while there is nothing. A connection that went silent is noticed when
its poll should have ended; the longest is less than the minute after which NATs and proxies forget one.
"""

POLL_S_PER_DEVICE: Final = 0.004
"""More devices poll less often: together 250 times a second, a tenth of a coordinator's core."""


def poll_s(n_devices: int) -> float:
    """How long the polls of so many devices are held."""
    shortest, longest = POLL_S
    return min(max(n_devices * POLL_S_PER_DEVICE, shortest), longest)


RequestId: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
Path: TypeAlias = Annotated[str, msgspec.Meta(max_length=1024, pattern=r"^/v1/[A-Za-z0-9._~%/?=&-]*\Z")]


Method: TypeAlias = Literal["GET", "POST", "DELETE"]


class Poll(Message, frozen=True):
    """Ask for work. ``holding``: requests that were handed over and are not answered yet."""

    holding: Annotated[tuple[RequestId, ...], msgspec.Meta(max_length=MAX_HELD)] = ()
    wait_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 0.0  # how long to hold the poll open while there is nothing
    protocol: Literal[1] = 1


class Request(Message, frozen=True):
    """A request to the device's routes."""

    id: RequestId
    method: Method
    path: Path
    body: bytes = b""


class Delivery(Message, frozen=True):
    """The answer to a `Poll`; empty where nothing came in time. ``wait_s``: of the next poll."""

    requests: tuple[Request, ...] = ()
    wait_s: Annotated[float, msgspec.Meta(ge=0)] = POLL_S[0]
    protocol: Literal[1] = 1


class Reply(Message, frozen=True):
    """What the device's routes answered to one `Request`."""

    status: Annotated[int, msgspec.Meta(ge=200, le=599)]
    content_type: Annotated[str, msgspec.Meta(max_length=128)] = ""
    body: bytes = b""
    protocol: Literal[1] = 1


class Enrolment(Message, frozen=True):
    """A one-time code, and the SHA-256 of the token that the device made: the token itself stays there until used."""

    code: Annotated[str, msgspec.Meta(max_length=64)]
    token_digest: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    protocol: Literal[1] = 1


class Enrolled(Message, frozen=True):
    """The name under which the device was invited."""

    device: Name
    protocol: Literal[1] = 1
