"""`Journal`: numbers a run's events and the library's warnings and passes them to sinks as JSON.

Sinks are a file (`LogFile`) and a monitor's readers. No sink can stop the run.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple, TypeAlias

from fedbpt.errors import ConfigError
from fedbpt.faults import public_reason, public_traceback
from fedbpt.plain_text import plain
from fedbpt.protocol import codec
from fedbpt.protocol.specs import Message
from fedbpt.quantities import PositiveInt
from fedbpt.runs.events import Event

log = logging.getLogger(__name__)


class Logged(Message, frozen=True, tag=True):
    """A record of Python's logging. ``exception``: the traceback, if any, without messages that may quote a row."""

    level: str
    logger: str
    message: str
    exception: str = ""


class Entry(Message, frozen=True):
    """An entry of the log. ``sitting``: random id of one start of the run, within which ``seq`` counts from 1;
    ``time`` (UTC, ISO 8601): only for people.
    """

    seq: PositiveInt
    time: str
    sitting: str
    event: Event | Logged


class Line(NamedTuple):
    """An entry and its JSON, without a line break."""

    entry: Entry
    json: bytes


Sink: TypeAlias = Callable[[Line], str]
"""Consumes a line without blocking; returns a warning, usually empty."""


class Journal:
    """An `EventCallback` that numbers events and passes them to ``sinks``, in order. Thread-safe."""

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks
        self._lock = threading.Lock()
        self._sitting = secrets.token_hex(4)
        self._seq = 0

    def __call__(self, event: Event | Logged) -> None:
        with self._lock:
            self._seq += 1
            now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            entry = Entry(seq=self._seq, time=now, sitting=self._sitting, event=event)
            line = Line(entry, plain(codec.encode_json(entry).decode()).encode())
            warnings = [sink(line) for sink in self._sinks]
        for warning in filter(None, warnings):  # without the lock: the warning may come back here as an entry
            log.warning("%s", warning)

    @contextmanager
    def hearing_warnings(self) -> Iterator[None]:
        """Record the library's warnings as entries within the block; they still reach other handlers."""
        logger = logging.getLogger("fedbpt")
        handlers: list[logging.Handler] = [_JournalHandler(self)]
        if logging.lastResort is not None and not logger.hasHandlers():
            handlers.append(logging.lastResort)  # a logger with a handler does not use it any more
        for handler in handlers:
            logger.addHandler(handler)
        try:
            yield
        finally:
            for handler in handlers:
                logger.removeHandler(handler)


class _JournalHandler(logging.Handler):
    def __init__(self, journal: Journal) -> None:
        super().__init__(logging.WARNING)
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        # Readers may be on other machines, so exceptions of a device in this process must not quote its rows.
        args = record.args if isinstance(record.args, tuple) else ()
        public = tuple(public_reason(arg) if isinstance(arg, BaseException) else arg for arg in args)
        message = record.msg % public if public else record.getMessage()
        trace = public_traceback(record.exc_info[1]) if record.exc_info else ""
        self._journal(Logged(level=record.levelname, logger=record.name, message=message, exception=trace))


class LogFile:
    """A sink that appends lines to ``path``. On a full disk lines are lost, with one warning, until there is space.

    Raises `ConfigError` if the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise ConfigError(f"cannot write the log {path}: {error.strerror or error}", field="log") from error
        self._truncated = False
        self._warned = False

    def __call__(self, line: Line) -> str:
        content = line.json + b"\n"
        if self._truncated:
            content = b"\n" + content  # end the truncated line
        try:
            self._truncated = self._file.write(content) != len(content)
            reason = "No space left on device"
        except OSError as error:
            self._truncated = True
            reason = error.strerror or str(error)
        if not self._truncated or self._warned:
            return ""
        self._warned = True
        return (
            f"cannot write the log {self._path}: {reason}; the run continues, entries from {line.entry.seq} may be lost"
        )

    def __enter__(self) -> LogFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
