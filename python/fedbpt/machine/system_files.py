"""Reading of Linux's ``/sys`` and ``/proc``, where any file may be missing, unreadable or malformed.

Android denies programs access to most of them, and reading a disabled sensor is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

SYSFS: Final = Path("/sys")
PROC: Final = Path("/proc")


def read(path: Path) -> str:
    """Read the text in ``path``, stripped of white space and NULs. Raises only OSError."""
    return path.read_bytes().decode(errors="replace").strip("\0 \t\r\n")


def text(path: Path) -> str | None:
    """As `read`, but None if the file cannot be read."""
    try:
        return read(path)
    except OSError:
        return None


def number(path: Path, base: int = 10) -> int | None:
    """Read the integer in ``path``; None if it cannot be read, or is not an integer."""
    try:
        return int(read(path), base)
    except (OSError, ValueError):
        return None


def entries(folder: Path, pattern: str) -> list[Path]:
    """The sorted paths in ``folder`` that match ``pattern``; empty if the folder cannot be read."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []
