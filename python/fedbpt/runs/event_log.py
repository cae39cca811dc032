"""`Journal`: what happens in one sitting of a run, numbered, as JSON: its events, and the library's warnings.

Each entry goes to sinks: a file (`LogFile`), a monitor's readers. No sink can stop the run.
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
    """What the library told Python's logging; ``exception``: the traceback, where there was one, without messages that
    may quote a row."""

    level: str
    logger: str
    message: str
    exception: str = ""


class Entry(Message, frozen=True):
    """``seq`` counts from 1 within a ``sitting``, of random name; ``time`` (UTC, ISO 8601) is for people alone."""

    seq: PositiveInt
    time: str
    sitting: str
    event: Event | Logged


class Line(NamedTuple):
    """An entry, and its JSON without line end."""

    entry: Entry
    json: bytes


Sink: TypeAlias = Callable[[Line], str]
"""Takes a line at once; returns what is to be warned of, mostly nothing."""


class Journal:
    """Numbers events and hands them to ``sinks``, in order. An `EventCallback`, from any thread."""

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
            troubles = [sink(line) for sink in self._sinks]
        for trouble in filter(None, troubles):  # without the lock: the warning may come back here as an entry
            log.warning("%s", trouble)

    @contextmanager
    def hearing_warnings(self) -> Iterator[None]:
        """Meanwhile the library's warnings are entries, too; people are told as before."""
        logger = logging.getLogger("fedbpt")
        handlers: list[logging.Handler] = [_JournalHandler(self)]
        if logging.lastResort is not None and not logger.hasHandlers():
            handlers.append(logging.lastResort)  # it would be silent now that there is a handler
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
        # A device may work in this process, and the journal's readers be elsewhere.
        given = record.args if isinstance(record.args, tuple) else ()
        told = tuple(public_reason(each) if isinstance(each, BaseException) else each for each in given)
        message = record.msg % told if told else record.getMessage()
        trace = public_traceback(record.exc_info[1]) if record.exc_info else ""
        self._journal(Logged(level=record.levelname, logger=record.name, message=message, exception=trace))


class LogFile:
    """A sink that appends lines to ``path``. On a full disk lines are lost, with one warning, until there is room.

    Raises `ConfigError` where the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise ConfigError(f"cannot write the log {path}: {error.strerror or error}") from error
        self._cut = self._warned = False

    def __call__(self, line: Line) -> str:
        content = line.json + b"\n"
        if self._cut:
            content = b"\n" + content  # the line that was cut ends here
        try:
            self._cut = self._file.write(content) != len(content)
            reason = "No space left on device"
        except OSError as error:
            self._cut, reason = True, error.strerror or str(error)
        if not self._cut or self._warned:
            return ""
        self._warned = True
        return (
            f"cannot write the log {self._path}: {reason}; the run goes on, entries from {line.entry.seq} may be lost"
        )

    def __enter__(self) -> LogFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
