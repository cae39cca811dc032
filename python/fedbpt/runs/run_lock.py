"""Lock a run for one process, with an operating system lock on a file next to the run's store.

The lock ends with the process that holds it. The file contains the holder's process id, for people, and is removed at
the end; a file left behind by a killed process locks nothing.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from fedbpt.errors import StoreError

log = logging.getLogger(__name__)

_NO_LOCKS: Final = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)  # some network file systems


@contextmanager
def sole_worker(store: Path, run: str) -> Iterator[None]:
    """Lock ``run`` of the database at ``store`` within the block. Raises `StoreError` if it is locked already."""
    name = hashlib.sha256(run.encode()).hexdigest()[:16]
    path = store.resolve()
    path = path.with_name(f"{path.name}-{name}.lock")
    try:
        file = _take(path)
    except BlockingIOError as error:
        raise StoreError(
            f"run {run!r} in {store} is running in {_holder(path)}: wait until it ends, or choose another run name or"
            " store",
            field="run",
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise StoreError(f"cannot lock run {run!r} with {path}: {error.strerror or error}", field="run") from error
        log.warning("cannot lock %s (%s): make sure that only one process runs %r", path, error.strerror, run)
        path.unlink(missing_ok=True)
        yield
        return
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before the lock ends, so that no other process's file is removed


def _take(path: Path) -> BinaryIO:
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                file.truncate(0)
                file.write(str(os.getpid()).encode())
                file.flush()
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # its holder removed it meanwhile: a new file of this name may exist


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        pid = path.read_bytes()
    except OSError:  # removed meanwhile
        pid = b""
    if pid == str(os.getpid()).encode():
        return "this process"
    return f"another process ({pid.decode()})" if pid.isdigit() else "another process"
