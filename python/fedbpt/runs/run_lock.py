"""One process at a time works on a run: a lock of the operating system's, on a file beside the run's store.

It ends with the process that holds it, however that ends. The file has the holder's number in it, for people, and is
removed at the end; one that a killed process left behind locks nothing.
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
    """Have ``run`` of the database at ``store`` for oneself. Raises `StoreError` where another has it."""
    name = hashlib.sha256(run.encode()).hexdigest()[:16]
    path = store.resolve()
    path = path.with_name(f"{path.name}-{name}.lock")
    try:
        file = _take(path)
    except BlockingIOError as error:
        raise StoreError(
            f"run {run!r} in {store} is running in {_holder(path)}: wait until it has ended, or choose another name for"
            " this run, or another store"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise StoreError(f"cannot lock run {run!r} by {path}: {error.strerror or error}") from error
        log.warning("%s cannot be locked (%s): see to it that one process alone runs %r", path, error.strerror, run)
        path.unlink(missing_ok=True)
        yield
        return
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before the lock ends: nobody else's is removed


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
        file.close()  # who held it removed it, and the next file of this name may be another's


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        pid = path.read_bytes()
    except OSError:  # it has ended meanwhile
        pid = b""
    if pid == str(os.getpid()).encode():
        return "this process already"
    return f"another process ({pid.decode()})" if pid.isdigit() else "another process"
