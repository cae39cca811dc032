"""Checks of strings, paths and encoded data from outside."""

from __future__ import annotations

import os
import re
from typing import Any, Final

import msgspec

from fedbpt.errors import InputError

DECODE_ERRORS: Final = (msgspec.DecodeError, ValueError, RecursionError)
"""What JSON, TOML and MessagePack decoders raise for invalid content, including invalid UTF-8, integers of thousands of
digits and nesting thousands deep."""

_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def half_character(text: str) -> str | None:
    """Describe the first lone surrogate of ``text``, which UTF-8 cannot encode; None if there is none.

    Text that was cut within an emoji holds one, and so does text decoded from bytes that are not UTF-8.
    """
    found = _SURROGATE.search(text)
    return None if found is None else f"half a character, \\u{ord(found[0]):04x}, at position {found.start()}"


def printable(text: str | os.PathLike[str]) -> str:
    """A name or path with bytes that are not UTF-8 escaped; Linux allows such paths."""
    return os.fspath(text).encode("utf-8", "backslashreplace").decode()


def utf8(text: Any, name: str) -> bytes:
    """Encode the argument ``name``. Raises `InputError` if it is not a string, or holds a lone surrogate."""
    if not isinstance(text, str):
        raise InputError(f"{name} must be a string, got {type(text).__name__}", field=name)
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        problem = f"{name} holds {half_character(text)}"
        raise InputError(f"{problem}: pass valid Unicode, not cut within an emoji", field=name) from error
