"""Atomic writes of files: written under temporary names, synced, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Collection, Mapping
from pathlib import Path

PARTIAL = ".part"


def write_whole(files: Mapping[Path, bytes], private: Collection[Path] = ()) -> None:
    """Write files, given by path: all of them or, if one cannot be written, none.

    Files in ``private`` get mode 0600. Raises OSError with the ``filename`` that could not be written.
    """
    number = secrets.token_hex(4)
    partials = {path: path.parent / f".{path.name}.{number}{PARTIAL}" for path in files}
    added: list[Path] = []
    target = Path()
    try:
        for target, partial in partials.items():
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            mode = 0o600 if target in private else 0o666
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(files[target])
                file.flush()
                os.fsync(file.fileno())
        for target, partial in partials.items():
            is_new = not target.exists()
            partial.replace(target)
            if is_new:
                added.append(target)
        for folder in {target.parent for target in files}:
            _sync_folder(folder)
    except OSError as error:
        for path in added:
            path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror or str(error), str(target)) from error
    finally:
        for partial in partials.values():
            if partial.exists():
                partial.unlink()


def _sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` last over a power failure, where its file system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder may let its files be written and not be listed
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)
