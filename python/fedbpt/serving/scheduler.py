"""`Scheduler`: computes completions round-robin on one thread, and delivers their pieces on the event loop.

Each time slice generates `SLICE` tokens of one request. So neither a long completion nor a request with many prompts
delays the others, and the KV of only one text is in use at a time.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

from fedbpt.device.agent.worker import Worker
from fedbpt.engine.text_stream import SLICE, Piece
from fedbpt.errors import FedbptError, ScoringInterrupted
from fedbpt.serving.models import Completion

MAX_REQUESTS: Final = 64
"""Maximum number of requests that are processed or waiting; more are rejected."""


class Scheduler:
    """Use it on one event loop."""

    def __init__(self) -> None:
        self._worker = Worker("fedbpt-serve")
        self._tickets: set[Ticket] = set()
        self._lock = threading.Lock()
        self._queue: deque[Ticket] = deque()
        self._is_running = False

    @property
    def is_full(self) -> bool:
        return len(self._tickets) >= MAX_REQUESTS

    def submit(self, starts: Sequence[Callable[[], Completion]]) -> Ticket:
        """Queue the completions of one request, in order. The ticket counts as a request until it is closed."""
        ticket = Ticket(starts, self._tickets.discard)
        self._tickets.add(ticket)
        with self._lock:
            self._queue.append(ticket)
            if not self._is_running:
                self._is_running = True
                self._worker.submit(self._run)
        return ticket

    def stop(self) -> None:
        """Cancel all completions."""
        for ticket in list(self._tickets):
            ticket.close()

    def close(self) -> bool:
        """Stop, and wait for the thread. Returns whether it ended in time."""
        self.stop()
        return self._worker.close()

    def _run(self) -> None:
        """Process the queue until it is empty, on the worker's thread."""
        while True:
            with self._lock:
                if not self._queue:
                    self._is_running = False
                    return
                ticket = self._queue.popleft()
            has_more = ticket.run_slice()
            with self._lock:
                is_alone = not self._queue
                if has_more:
                    self._queue.append(ticket)
            if has_more and not is_alone:
                ticket.pause()


class Ticket:
    """The completions of one request, as ``jobs`` that are computed one after another."""

    def __init__(self, starts: Sequence[Callable[[], Completion]], on_close: Callable[[Ticket], None]) -> None:
        self.jobs = [Job(start) for start in starts]
        self._on_close = on_close
        self._current = 0

    def close(self) -> None:
        """Cancel unfinished completions and free the slot. Idempotent."""
        for job in self.jobs:
            job.cancel()
        self._on_close(self)

    def run_slice(self) -> bool:
        """Compute a slice, on the worker's thread. Returns whether there is more to compute."""
        if self.jobs[self._current].run_slice():
            self._current += 1
        return self._current < len(self.jobs)

    def pause(self) -> None:
        """Release the generator between two slices, on the worker's thread."""
        self.jobs[self._current].pause()


class Job:
    """A completion that is waiting or being computed. ``start``: begins it."""

    def __init__(self, start: Callable[[], Completion]) -> None:
        self._start = start
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Completion | Piece | Exception | None] = asyncio.Queue()
        self._completion: Completion | None = None
        self._cancelled = False

    async def started(self) -> Completion:
        """Wait until the completion is started. Raises what starting it raised."""
        item = await self._items.get()
        if isinstance(item, Exception):
            raise item
        if self._completion is None:
            raise FedbptError("the completion was cancelled before it started: send the request again")
        return self._completion

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield the pieces; call it after `started`. Raises what computing them raised."""
        while (item := await self._items.get()) is not None:
            if isinstance(item, Exception):
                raise item
            if isinstance(item, Piece):
                yield item

    def cancel(self) -> None:
        """Stop within the current graph computation, or never start. Idempotent."""
        self._cancelled = True
        if self._completion is not None:
            self._completion.cancel()

    # --- on the worker's thread ----------------------------------------------------------------------------------

    def run_slice(self) -> bool:
        """Compute a slice. Returns whether the completion is finished."""
        try:
            finished = self._compute()
        except Exception as error:  # noqa: BLE001 - raised where the completion is awaited
            self._end(error)
            return True
        if finished:
            self._end(None)
        return finished

    def pause(self) -> None:
        """Release the generator for another text."""
        if self._completion is not None:
            self._completion.pause()

    def _compute(self) -> bool:
        if self._completion is None:
            if self._cancelled:
                return True
            self._completion = self._start()
            self._put(self._completion)
        for _ in range(SLICE):
            if self._cancelled:  # `cancel` may have been called before `_completion` was set
                raise ScoringInterrupted("the text was interrupted")
            piece = next(self._completion, None)
            if piece is None:
                return True
            self._put(piece)
        return False

    def _end(self, last: Exception | None) -> None:
        if self._completion is not None:
            self._completion.close()
        self._put(last)

    def _put(self, item: Completion | Piece | Exception | None) -> None:
        if not self._loop.is_closed():  # closed: the server has stopped, and nobody waits
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
