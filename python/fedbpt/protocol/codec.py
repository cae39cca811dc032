"""Messages as bytes: MessagePack between machines, JSON for people; strict limits both ways.

A body is one message of a type that the route names. What is refused, with `WireError`: a body over
`MAX_BODY_BYTES`, anything that is not the type (unknown, missing or ill-typed fields, nesting too deep), an array
whose bytes do not fit its shape, NaN or infinity anywhere, an array whose Euclidean norm exceeds `MAX_NORM`.
What a machine says to people in free text (`ErrorReply`, ...) is cut, not refused.
Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final, TypeVar

import msgspec
import numpy as np

from fedbpt.checking import DECODE_ERRORS, half_character
from fedbpt.errors import WireError
from fedbpt.plain_text import MOST_TOLD, one_line
from fedbpt.protocol.rounds import DeviceInfo, ErrorReply, RoundProgress
from fedbpt.protocol.specs import Array, Message

CONTENT_TYPE: Final = "application/vnd.fedbpt.v1+msgpack"
JSON_TYPE: Final = "application/json"

MAX_BODY_BYTES: Final = 16 * 2**20
"""Largest body that is read. A plan with a full float64 covariance at d = 1,000 takes 8 MB."""

MAX_NORM: Final = 1e9
"""Largest Euclidean norm of any array. Losses and latents of a sane run stay many orders below."""

_TOLD: Final[Mapping[type[Message], tuple[str, ...]]] = {
    DeviceInfo: ("version", "model_name", "backend", "paused"),
    ErrorReply: ("code", "message"),
    RoundProgress: ("error", "paused"),
}
"""Free text for people. What is received of it becomes one plain line of at most `MOST_TOLD` characters."""

M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """MessagePack bytes. Deterministic: equal messages give equal bytes. Raises `WireError` for what has none."""
    try:
        return msgspec.msgpack.encode(message)
    except (UnicodeEncodeError, OverflowError) as error:
        raise WireError(f"a {type(message).__name__} cannot be sent: {_unsendable(error)}") from error


def encode_json(message: Message) -> bytes:
    """JSON bytes; arrays' data as base64. Raises as `encode` does."""
    try:
        return msgspec.json.encode(message)
    except (UnicodeEncodeError, OverflowError) as error:
        raise WireError(f"a {type(message).__name__} cannot be sent: {_unsendable(error)}") from error


def decode(body: bytes, kind: type[M], limit: int = MAX_BODY_BYTES) -> M:
    """The message of type ``kind`` that MessagePack ``body`` holds; raises `WireError`."""
    _check_size(body, limit)
    try:
        message: M = _msgpack_decoder(kind).decode(body)
    except DECODE_ERRORS as error:
        raise WireError(f"not a valid {kind.__name__}: {one_line(str(error), MOST_TOLD)}") from error
    return _checked(message)


def decode_json(body: bytes, kind: type[M], limit: int = MAX_BODY_BYTES) -> M:
    """The message of type ``kind`` that JSON ``body`` holds; raises `WireError`."""
    _check_size(body, limit)
    try:
        message: M = _json_decoder(kind).decode(body)
    except DECODE_ERRORS as error:
        raise WireError(f"not a valid {kind.__name__}: {one_line(str(error), MOST_TOLD)}") from error
    return _checked(message)


def digest(message: Message) -> str:
    """The first 128 bits (hex) of the message's sha256, as a receiver would encode it again.

    The round trip makes it the same on both sides even where the sender wrote an int into a float field.
    """
    received = _msgpack_decoder(type(message)).decode(encode(message))
    return hashlib.sha256(encode(received)).hexdigest()[:32]


def check(message: Message) -> None:
    """Raises `WireError` for an array that does not fit its shape, NaN, infinity, or a norm over `MAX_NORM`."""
    _check_value(message, type(message).__name__)


def _unsendable(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return f"a text in it holds {half_character(error.object)}"
    return "a number in it is too large"


def _checked(message: M) -> M:
    for field in _TOLD.get(type(message), ()):
        msgspec.structs.force_setattr(message, field, one_line(getattr(message, field), MOST_TOLD))
    check(message)
    return message


def _check_size(body: bytes, limit: int) -> None:
    if len(body) > limit:
        raise WireError(f"body of {len(body)} bytes is over the limit of {limit}")


def _check_value(value: object, where: str) -> None:
    if isinstance(value, Array):
        _check_array(value, where)
    elif isinstance(value, Message):
        for field in value.__struct_fields__:
            _check_value(getattr(value, field), f"{where}.{field}")
    elif isinstance(value, tuple):
        for item in value:
            _check_value(item, where)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_value(item, f"{where}.{key}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise WireError(f"{where} is NaN or infinite")


def _check_array(array: Array, where: str) -> None:
    try:
        values = array.numpy()
    except WireError as error:
        raise WireError(f"{where}: {error}") from error
    except ValueError as error:  # numpy's own limits: more than 64 dimensions
        raise WireError(f"{where}: impossible shape {list(array.shape)[:8]}") from error
    # A norm of finite entries can overflow to infinity; that too is over the bound.
    with np.errstate(over="ignore"):
        norm = float(np.linalg.norm(values.ravel()))
    if not norm <= MAX_NORM:
        raise WireError(f"{where}: norm {norm:.3g} is over the bound {MAX_NORM:.0e}")


@lru_cache(maxsize=64)
def _msgpack_decoder(kind: type[Any]) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(kind)


@lru_cache(maxsize=64)
def _json_decoder(kind: type[Any]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)
