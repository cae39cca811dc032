"""Decoding into message types: MessagePack, JSON, and what another parser has read.

msgspec keeps what it knows of a struct on the class, from the first use on. While one thread collects it, another one
that decodes the same class would read a part of it, and crash. So it is collected for one type at a time, here.
"""

from __future__ import annotations

import os
import threading
from functools import cache
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

_collecting = threading.RLock()


def _after_fork() -> None:
    global _collecting
    _collecting = threading.RLock()  # another thread of the parent may hold it


os.register_at_fork(after_in_child=_after_fork)


@cache
def _collected(kind: Any) -> tuple[msgspec.msgpack.Decoder[Any], msgspec.json.Decoder[Any]]:
    with _collecting:
        return msgspec.msgpack.Decoder(kind), msgspec.json.Decoder(kind)


def _decoders(kind: Any) -> tuple[msgspec.msgpack.Decoder[Any], msgspec.json.Decoder[Any]]:
    return _collected(kind)  # typed: mypy takes no class for hashable


def from_msgpack(body: bytes, kind: type[T]) -> T:
    """Decode MessagePack as ``kind``. Raises `fedbpt.checking.DECODE_ERRORS`, as the other functions do."""
    found: T = _decoders(kind)[0].decode(body)
    return found


def from_json(text: bytes | str, kind: type[T]) -> T:
    """Decode JSON as ``kind``."""
    found: T = _decoders(kind)[1].decode(text)
    return found


def from_builtins(value: Any, kind: type[T]) -> T:
    """Make a ``kind`` of lists, dicts, strings and numbers."""
    _decoders(kind)
    return msgspec.convert(value, kind)
