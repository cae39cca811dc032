"""Fingerprints of models: the sha256 of their files, cached in the cache folder."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from fedbpt.argument_types import checked
from fedbpt.errors import ModelNotFoundError
from fedbpt.machine.folders import cache_folder
from fedbpt.machine.wheel_files import sha256_of
from fedbpt.models.parts import model_parts
from fedbpt.models.records import read_record, write_record

log = logging.getLogger(__name__)


class FileStamp(msgspec.Struct, frozen=True):
    """File metadata that changes when a file is written to or replaced. ``size`` in bytes, times in nanoseconds.

    ``ctime_ns`` also changes where the modification time is kept, as by `cp -p`.
    """

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class _Fingerprint(msgspec.Struct, frozen=True):
    sha256: str
    paths: tuple[str, ...]
    files: tuple[FileStamp, ...]


@checked
def fingerprint(path: str | Path) -> str:
    """``sha256:<hex>`` of a model's file, or of all parts of a split model concatenated in order, given any part.

    Cached until one of the files changes.

    Raises:
        ModelNotFoundError: no such file.
        ModelFileError: a part of a split model is missing or damaged.
    """
    if not Path(path).is_file():
        raise ModelNotFoundError(f"no such model file: {path}")
    return fingerprint_of_files(model_parts(Path(path)))


def fingerprint_of_files(parts: Sequence[Path]) -> str:
    """``sha256:<hex>`` of files concatenated in this order, cached as by `fingerprint`. Raises `OSError`."""
    paths = real_paths(parts)
    stamps = stamps_of(parts)
    known = read_record(_record_of(paths), _Fingerprint)
    if known is None or (known.paths, known.files) != (paths, stamps):
        # stamps from before reading: a file that changes meanwhile is read again the next time
        known = _Fingerprint(sha256_of(*parts), paths, stamps)
        _remember(known)
    return f"sha256:{known.sha256}"


def stamps_of(parts: Sequence[Path]) -> tuple[FileStamp, ...]:
    """The stamp of each file. Raises `OSError` if one is missing."""
    found = [part.stat() for part in parts]
    return tuple(FileStamp(each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in found)


def forget_fingerprint(parts: Sequence[Path]) -> None:
    """Remove the cached fingerprint of existing files. Raises `OSError`."""
    _record_of(real_paths(parts)).unlink(missing_ok=True)


def remember_fingerprint(path: Path, sha256: str) -> None:
    """Cache the known sha256 (hexadecimal) of a model in one file."""
    _remember(_Fingerprint(sha256, real_paths([path]), stamps_of([path])))


def real_paths(parts: Sequence[Path]) -> tuple[str, ...]:
    """Paths with links resolved, as text that JSON can hold."""
    return tuple(os.fsencode(part.resolve()).decode(errors="backslashreplace") for part in parts)


def _record_of(paths: Sequence[str]) -> Path:
    name = hashlib.sha256("\0".join(paths).encode()).hexdigest()[:32]
    return cache_folder() / "fingerprints" / f"{name}.json"


def _remember(found: _Fingerprint) -> None:
    try:
        write_record(_record_of(found.paths), found)
    except OSError as error:  # a full disk or a read-only cache: slower, not wrong
        log.warning(
            "cannot cache the fingerprint of %s in %s (%s): it is computed again at each start",
            Path(found.paths[0]).name,
            cache_folder(),
            error.strerror or error,
        )
