"""Reading Linux's files on the machine (``/sys``, ``/proc``), any of which may be absent, closed or odd.

Android closes most of them to its programs, and a sensor that is switched off answers with an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

SYSFS: Final = Path("/sys")
PROC: Final = Path("/proc")


def read(path: Path) -> str:
    """The text in ``path``, without white space and NULs around it. Raises OSError, and nothing else."""
    return path.read_bytes().decode(errors="replace").strip("\0 \t\r\n")


def text(path: Path) -> str | None:
    """As `read`; None: the system does not tell."""
    try:
        return read(path)
    except OSError:
        return None


def number(path: Path, base: int = 10) -> int | None:
    """The whole number in ``path``; None: the system does not tell, or something else is there."""
    try:
        return int(read(path), base)
    except (OSError, ValueError):
        return None


def entries(folder: Path, pattern: str) -> list[Path]:
    """What there is in ``folder`` by ``pattern``, in order; nothing where this process may not look."""
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []
