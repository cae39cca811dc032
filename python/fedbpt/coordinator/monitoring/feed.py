"""`EventFeed`: the latest lines of a run's event log, for any number of readers. The run never waits for a reader.

A limited number of lines is kept for all readers, each of which has a position in them. A reader that is too slow, or
comes late, is told how many lines it missed, and gets the latest line of each kind in `KEEP_LATEST` all the same:
without them, the lines that follow cannot be read.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator
from typing import Final, NamedTuple

from fedbpt.net.deadlines import within
from fedbpt.runs.event_log import Line
from fedbpt.runs.events import RunStarted, StageBegan, TemplateSelected

KEEP_LINES: Final = 2000
KEEP_BYTES: Final = 8 * 2**20

KEEP_LATEST: Final = (RunStarted, TemplateSelected, StageBegan)
"""Events of which the latest line is kept beyond these limits."""


class Missed(NamedTuple):
    """Number of lines that were dropped before the reader came to them."""

    lines: int


class EventFeed:
    """A `fedbpt.runs.event_log.Sink`. Readers use the event loop that called `open`."""

    def __init__(self, keep_lines: int = KEEP_LINES, keep_bytes: int = KEEP_BYTES) -> None:
        self._keep_lines = keep_lines
        self._keep_bytes = keep_bytes
        self._lock = threading.Lock()
        self._lines: deque[Line] = deque()
        self._latest: dict[type, Line] = {}
        self._bytes = 0
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._woken: set[asyncio.Event] = set()

    def __call__(self, line: Line) -> str:
        with self._lock:
            self._lines.append(line)
            if isinstance(line.entry.event, KEEP_LATEST):
                self._latest[type(line.entry.event)] = line
            self._bytes += len(line.json)
            while len(self._lines) > self._keep_lines or (self._bytes > self._keep_bytes and len(self._lines) > 1):
                self._bytes -= len(self._lines.popleft().json)
            loop = self._loop if self._woken else None
            if loop is not None and not loop.is_closed():
                loop.call_soon_threadsafe(self._wake)
        return ""

    def open(self) -> None:
        """Take readers from the running event loop. May be repeated there."""
        with self._lock:
            self._loop = None if self._closed else asyncio.get_running_loop()

    def close(self) -> None:
        """End: readers stop after the lines that are left. Call on the loop."""
        with self._lock:
            self._closed = True
            self._loop = None
        self._wake()

    def end(self) -> None:
        """`close`, from any thread."""
        with self._lock:
            loop = self._loop
            self._closed = True
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self.close)

    @property
    def n_readers(self) -> int:
        return len(self._woken)

    async def read(self, after: str, heartbeat_s: float) -> AsyncIterator[Line | Missed | None]:
        """Yield the lines after the id ``after`` (``SITTING-SEQ``) that are kept; an unknown id: all.

        Yields None after ``heartbeat_s`` seconds without a line.
        """
        woken = asyncio.Event()
        self._woken.add(woken)
        try:
            sitting, _, seq = after.rpartition("-")
            read = int(seq) if sitting and seq.isdecimal() and len(seq) < 19 else 0
            while True:
                woken.clear()
                line, closed = self._next(sitting, read)
                if line is not None:
                    if sitting == line.entry.sitting and line.entry.seq > read + 1:
                        yield Missed(line.entry.seq - read - 1)
                    sitting, read = line.entry.sitting, line.entry.seq
                    yield line
                elif closed:
                    return
                else:
                    try:
                        await within(heartbeat_s, woken.wait())
                    except asyncio.TimeoutError:
                        yield None
        finally:
            self._woken.discard(woken)

    def _next(self, sitting: str, read: int) -> tuple[Line | None, bool]:
        """The first line kept after ``read``, and whether the feed is closed."""
        with self._lock:
            if not self._lines:
                return None, self._closed
            first = self._lines[0].entry  # line numbers have no gaps
            read = read if sitting == first.sitting else 0
            dropped = [line for line in self._latest.values() if read < line.entry.seq < first.seq]
            if dropped:
                return min(dropped, key=lambda line: line.entry.seq), self._closed
            place = max(read + 1 - first.seq, 0) if read else 0
            return (self._lines[place] if place < len(self._lines) else None), self._closed

    def _wake(self) -> None:
        for woken in self._woken:
            woken.set()
