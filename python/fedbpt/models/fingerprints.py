"""Fingerprints of models: the sha256 of their files, computed once and kept in the cache folder."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from fedbpt.errors import ModelNotFoundError
from fedbpt.models.parts import model_parts
from fedbpt.models.records import read_record, write_record
from fedbpt.packages import cache_folder, sha256_of

log = logging.getLogger(__name__)


class FileStamp(msgspec.Struct, frozen=True):
    """What changes when a file is replaced or written to: ``size`` in bytes, times in nanoseconds.

    ``ctime_ns`` tells of what leaves the time of modification as it was, as `cp -p` does.
    """

    path: str
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class _Fingerprint(msgspec.Struct, frozen=True):
    sha256: str
    files: tuple[FileStamp, ...]


def fingerprint(path: str | Path) -> str:
    """``sha256:<hex>`` of a model's file; of a split model, of all its parts joined in order, whichever is given.

    Computed once, then kept until one of the files changes.

    Raises:
        ModelNotFoundError: no such file.
        ModelFileError: a part of a split model is missing or damaged.
    """
    if not Path(path).is_file():
        raise ModelNotFoundError(f"no such model file: {path}")
    parts = model_parts(Path(path))
    stamps = stamps_of(parts)
    known = read_record(_record_of(stamps), _Fingerprint)
    if known is None or known.files != stamps:
        return f"sha256:{_remember(stamps, sha256_of(*parts))}"
    return f"sha256:{known.sha256}"


def stamps_of(parts: Sequence[Path]) -> tuple[FileStamp, ...]:
    """The stamp of each file. Raises `OSError` where one is gone."""
    found = []
    for part in parts:
        status = part.stat()
        path = os.fsencode(part.resolve()).decode(errors="backslashreplace")
        found.append(FileStamp(path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return tuple(found)


def remember_fingerprint(path: Path, sha256: str) -> None:
    """Keep the sha256 (hex) of a model in one file, where it is known already."""
    _remember(stamps_of([path]), sha256)


def _record_of(stamps: Sequence[FileStamp]) -> Path:
    return cache_folder() / "fingerprints" / f"{hashlib.sha256(stamps[0].path.encode()).hexdigest()[:32]}.json"


def _remember(stamps: tuple[FileStamp, ...], sha256: str) -> str:
    try:
        write_record(_record_of(stamps), _Fingerprint(sha256, stamps))
    except OSError as error:  # a full disk, a read-only cache: slower, not wrong
        log.warning(
            "the fingerprint of %s cannot be kept in %s (%s): it is computed anew at each start",
            Path(stamps[0].path).name, cache_folder(), error.strerror or error,
        )  # fmt: skip
    return sha256
