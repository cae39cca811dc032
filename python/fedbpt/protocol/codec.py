"""Encode and decode messages: MessagePack between machines, JSON for people.

The route determines the type of the one message in a body. `decode` raises `WireError` for a body over
`MAX_BODY_BYTES`, for unknown, missing or ill-typed fields and too deep nesting, for an array whose bytes do not match
its shape or whose Euclidean norm exceeds `MAX_NORM`, and for NaN or infinity anywhere.
Free text for people (`ErrorReply`, ...) is truncated, not refused. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Final, TypeVar

import msgspec
import numpy as np

from fedbpt.checking import DECODE_ERRORS, half_character
from fedbpt.decoders import from_json, from_msgpack
from fedbpt.errors import WireError
from fedbpt.plain_text import MOST_TOLD, one_line
from fedbpt.protocol.rounds import DeviceInfo, ErrorReply, RoundProgress
from fedbpt.protocol.specs import Array, Message

CONTENT_TYPE: Final = "application/vnd.fedbpt.v1+msgpack"
JSON_TYPE: Final = "application/json"

MAX_BODY_BYTES: Final = 16 * 2**20
"""Largest body accepted, bytes. A plan with a full float64 covariance at d = 1,000 takes 8 MB."""

MAX_NORM: Final = 1e9
"""Largest Euclidean norm of any array. Losses and latents of a working run are many orders of magnitude below."""

_FREE_TEXT: Final[Mapping[type[Message], tuple[str, ...]]] = {
    DeviceInfo: ("version", "model_name", "backend", "paused"),
    ErrorReply: ("code", "message"),
    RoundProgress: ("error", "paused"),
}
"""Fields of free text for people; `decode` makes each one plain line of at most `MOST_TOLD` characters."""

M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """Encode as MessagePack; equal messages give equal bytes.

    Raises `WireError` for text with a lone surrogate and for integers beyond 64 bits.
    """
    try:
        return msgspec.msgpack.encode(message)
    except (UnicodeEncodeError, OverflowError) as error:
        raise WireError(f"a {type(message).__name__} cannot be sent: {_unsendable(error)}") from error


def encode_json(message: Message) -> bytes:
    """Encode as JSON, array data as base64. Raises as `encode` does."""
    try:
        return msgspec.json.encode(message)
    except (UnicodeEncodeError, OverflowError) as error:
        raise WireError(f"a {type(message).__name__} cannot be sent: {_unsendable(error)}") from error


def decode(body: bytes, kind: type[M], limit: int = MAX_BODY_BYTES) -> M:
    """Decode a MessagePack ``body`` of at most ``limit`` bytes as ``kind``. Raises `WireError`."""
    _check_size(body, limit)
    try:
        message: M = from_msgpack(body, kind)
    except DECODE_ERRORS as error:
        raise WireError(f"not a valid {kind.__name__}: {one_line(str(error), MOST_TOLD)}") from error
    return _checked(message)


def decode_json(body: bytes, kind: type[M], limit: int = MAX_BODY_BYTES) -> M:
    """Decode a JSON ``body`` of at most ``limit`` bytes as ``kind``. Raises `WireError`."""
    _check_size(body, limit)
    try:
        message: M = from_json(body, kind)
    except DECODE_ERRORS as error:
        raise WireError(f"not a valid {kind.__name__}: {one_line(str(error), MOST_TOLD)}") from error
    return _checked(message)


def digest(message: Message) -> str:
    """The first 128 bits, in hex, of the SHA-256 of the message as its receiver would encode it again.

    The round trip gives both sides the same digest even if the sender put an int into a float field.
    """
    received = from_msgpack(encode(message), type(message))
    return hashlib.sha256(encode(received)).hexdigest()[:32]


def check(message: Message) -> None:
    """Raise `WireError` for NaN, infinity, an array that does not match its shape, or a norm over `MAX_NORM`."""
    _check_value(message, type(message).__name__)


def _unsendable(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return f"a string has {half_character(error.object)}, expected valid Unicode"
    return "an integer must fit 64 bits"


def _checked(message: M) -> M:
    for field in _FREE_TEXT.get(type(message), ()):
        msgspec.structs.force_setattr(message, field, one_line(getattr(message, field), MOST_TOLD))
    check(message)
    return message


def _check_size(body: bytes, limit: int) -> None:
    if len(body) > limit:
        raise WireError(f"the body has {len(body)} bytes, the limit is {limit}", limit=limit)


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
        raise WireError(f"{where} must be finite", field=where)


def _check_array(array: Array, where: str) -> None:
    try:
        values = array.numpy()
    except WireError as error:
        raise WireError(f"{where}: {error}", field=where) from error
    except ValueError as error:  # numpy's own limits: more than 64 dimensions
        shape = list(array.shape)[:8]
        raise WireError(f"{where}: invalid shape {shape}, expected at most 64 dimensions", field=where) from error
    # The norm of finite entries can overflow to infinity, which is over the bound too.
    with np.errstate(over="ignore"):
        norm = float(np.linalg.norm(values.ravel()))
    if not norm <= MAX_NORM:
        raise WireError(f"{where}: norm {norm:.3g}, the limit is {MAX_NORM:.0e}", field=where, limit=MAX_NORM)
