"""Small JSON records in the cache folder, which can be computed again if lost."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TypeVar

import msgspec

from fedbpt.checking import DECODE_ERRORS
from fedbpt.decoders import from_json
from fedbpt.machine.wheel_files import publish

_T = TypeVar("_T", bound=msgspec.Struct)


def write_record(path: Path, value: msgspec.Struct) -> None:
    """Write ``value`` to ``path`` atomically. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident():x}.tmp")
    try:
        temporary.write_bytes(msgspec.json.encode(value))
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_record(path: Path, kind: type[_T]) -> _T | None:
    """Read the record at ``path``; None if it is missing, unreadable, damaged or of another version."""
    try:
        return from_json(path.read_bytes(), kind)
    except (OSError, *DECODE_ERRORS):
        return None
