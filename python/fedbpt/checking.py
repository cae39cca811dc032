"""Values from outside, checked where they enter: what cannot be used is an error of ours that names it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final

import msgspec

from fedbpt.errors import InputError

DECODE_ERRORS: Final = (msgspec.DecodeError, ValueError, RecursionError)
"""What JSON, TOML and MessagePack decoders raise for content that is none: also bytes that are no UTF-8, an integer of
thousands of digits, a depth of thousands."""

_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def half_character(text: str) -> str | None:
    """The first character of ``text`` that UTF-8 cannot write, in words; None: there is none.

    A text that was cut within an emoji holds one, and so does one made of bytes that were not UTF-8.
    """
    found = _SURROGATE.search(text)
    return None if found is None else f"half a character, \\u{ord(found[0]):04x}, at position {found.start()}"


def at_home(path: str | os.PathLike[str]) -> Path:
    """``path`` with the folder that ``~`` stands for; as it is, where that is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def printable(text: str | os.PathLike[str]) -> str:
    """A name or a path as UTF-8 can write it: Linux has paths whose bytes are none."""
    return os.fspath(text).encode("utf-8", "backslashreplace").decode()


def utf8(text: Any, name: str) -> bytes:
    """``text`` as UTF-8. Raises `InputError` for what is no string, or holds half a character."""
    if not isinstance(text, str):
        raise InputError(f"{name} must be a string, got {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} holds {half_character(text)}: it was cut within an emoji, or is no UTF-8") from error
