"""fedbpt's messages inside Flower's: one record with the message's kind and its wire bytes.

The bytes are the same as over HTTP, and pass the same checks. ``benchmarks/bench_flower.py`` measures Flower's
overhead.
"""

from __future__ import annotations

from typing import Final, TypeVar

from flwr.app import ConfigRecord, RecordDict

from fedbpt.errors import WireError
from fedbpt.protocol import codec
from fedbpt.protocol.refusals import refusal_of
from fedbpt.protocol.rounds import ErrorReply
from fedbpt.protocol.specs import Message

M = TypeVar("M", bound=Message)

RECORD: Final = "fedbpt"


def packed(message: Message | None) -> RecordDict:
    """``message`` as the content of a Flower message; None: a query without arguments."""
    kind, body = ("", b"") if message is None else (type(message).__name__, codec.encode(message))
    return RecordDict({RECORD: ConfigRecord({"kind": kind, "body": body})})


def body_of(content: RecordDict, kind: type[Message]) -> bytes:
    """The wire bytes of a message of ``kind`` in ``content``. Raises `WireError` if it contains none."""
    record = content.config_records.get(RECORD)
    found = record.get("kind") if record is not None else None
    body = record.get("body") if record is not None else None
    if found != kind.__name__ or not isinstance(body, bytes):
        raise WireError(f"expected a {kind.__name__}, got {found or 'no message of fedbpt'}")
    return body


def unpacked(content: RecordDict, kind: type[M]) -> M:
    """The message of ``kind`` in ``content``. Raises `WireError`."""
    return codec.decode(body_of(content, kind), kind)


def reply_of(content: RecordDict, kind: type[M], name: str) -> M:
    """The reply of device ``name``. Raises `DeviceFailedError` or `DeviceRefusedError` if it is an error."""
    record = content.config_records.get(RECORD)
    try:
        if record is not None and record.get("kind") == ErrorReply.__name__:
            raise refusal_of(unpacked(content, ErrorReply), name)
        return unpacked(content, kind)
    except WireError as error:
        raise WireError(f"{name}: {error}") from error


def size_of(content: RecordDict) -> int:
    """Size of fedbpt's message in ``content`` in bytes, without Flower's overhead."""
    body = content[RECORD].get("body") if RECORD in content else b""
    return len(body) if isinstance(body, bytes) else 0
