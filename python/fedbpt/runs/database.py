"""`Database`: base of an SQLite file that several threads use, whose errors name the file and its kind."""

from __future__ import annotations

import os
import sqlite3
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Final, TypeVar

from fedbpt.argument_types import checked
from fedbpt.errors import StoreError

T = TypeVar("T", bound="Database")

IN_MEMORY: Final = ":memory:"
"""SQLite's name for a database without a file."""


class Database(ABC):
    """The database at ``path``, created with its folder if absent; None: an in-memory database. Thread-safe.

    Raises:
        StoreError: the file cannot be opened, read or written, or is not such a database.
    """

    WHAT: ClassVar[str]
    """The kind of file in errors, such as ``run database``."""

    @checked
    def __init__(self, path: str | Path | None) -> None:
        self.path = Path(IN_MEMORY if path is None else path)
        self.in_memory = str(self.path) == IN_MEMORY
        self._lock = threading.RLock()
        self._process = os.getpid()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                IN_MEMORY if self.in_memory else self.path.absolute(),
                timeout=10.0,
                isolation_level=None,
                check_same_thread=False,
            )
            self._db.execute("PRAGMA temp_store = MEMORY")  # there may be no folder for temporary files
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"cannot open the {self.WHAT} {self.path}: {error}") from error
        try:
            self._prepare()
        except BaseException:
            self._db.close()
            raise

    @abstractmethod
    def _prepare(self) -> None:
        """Create the tables of a new file. Raises `StoreError` for another kind of file."""

    def close(self) -> None:
        """Close the database, which cannot be used afterwards."""
        with self._lock:
            self._db.close()

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    def _check_process(self) -> None:
        """Raise `StoreError` after a fork: SQLite locks belong to a process, a shared connection damages the file."""
        if self._process != os.getpid():
            raise StoreError(
                f"the {self.WHAT} {self.path} was opened before this process was forked: open it again here"
            )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """A transaction: rolled back if the block raises."""
        self._check_process()
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    yield self._db
                    self._db.execute("COMMIT")
                finally:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
            except sqlite3.Error as error:
                raise StoreError(f"cannot write the {self.WHAT} {self.path}: {error}") from error

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        self._check_process()
        with self._lock:
            try:
                yield self._db
            except sqlite3.Error as error:
                raise StoreError(f"cannot read the {self.WHAT} {self.path}: {error}") from error
