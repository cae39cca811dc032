"""Our messages inside Flower's: one record, of the message's kind and its wire bytes.

The same bytes as over HTTP, so that what is refused there is refused here. ``benchmarks/bench_flower.py`` measures what
Flower adds to them.
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
    """``message`` as a Flower message's content; None: a question without arguments."""
    kind, body = ("", b"") if message is None else (type(message).__name__, codec.encode(message))
    return RecordDict({RECORD: ConfigRecord({"kind": kind, "body": body})})


def body_of(content: RecordDict, kind: type[Message]) -> bytes:
    """The wire bytes of a content of ``kind``. Raises `WireError` where it holds none."""
    record = content.config_records.get(RECORD)
    found, body = (record.get("kind"), record.get("body")) if record is not None else (None, None)
    if found != kind.__name__ or not isinstance(body, bytes):
        raise WireError(f"not a {kind.__name__}: the message holds {found or 'nothing of fedbpt'}")
    return body


def unpacked(content: RecordDict, kind: type[M]) -> M:
    """The message of ``kind``. Raises `WireError`."""
    return codec.decode(body_of(content, kind), kind)


def answer_of(content: RecordDict, kind: type[M], name: str) -> M:
    """What device ``name`` answered. Raises `DeviceFailedError` or `DeviceRefusedError` where it says why not."""
    record = content.config_records.get(RECORD)
    try:
        if record is not None and record.get("kind") == ErrorReply.__name__:
            raise refusal_of(unpacked(content, ErrorReply), name)
        return unpacked(content, kind)
    except WireError as error:
        raise WireError(f"{name}: {error}") from error


def size_of(content: RecordDict) -> int:
    """Bytes of our message in ``content``, without what Flower puts around it."""
    body = content[RECORD].get("body") if RECORD in content else b""
    return len(body) if isinstance(body, bytes) else 0
