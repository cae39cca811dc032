"""Lock something for one process, with an operating system lock on a file.

The lock ends with the process that holds it. The file contains the holder's process id, for people, and is removed at
the end; a file left behind by a killed process locks nothing.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

log = logging.getLogger(__name__)

_NO_LOCKS: Final = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)  # some network file systems


@contextmanager
def sole_holder(path: Path, what: str) -> Iterator[None]:
    """Hold the lock at ``path`` within the block. ``what``: it locks, for the log where the file system has no locks.

    Raises BlockingIOError if it is held already, whose text names the holder, and OSError if the file cannot be made.
    """
    try:
        file = _take(path)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, _holder(path)) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("cannot lock %s (%s): make sure that only one process uses %s", path, error.strerror, what)
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
