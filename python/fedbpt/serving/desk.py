"""`Desk`: the answers to requests, computed by turns on one thread, and given out piece by piece on the event loop.

A turn is `SLICE` tokens of one request's answer; then the next request has its turn. So neither a long answer nor a
request with many prompts holds up the others, and there is never more than one text whose KV must be kept.
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
from fedbpt.serving.answers import Answer

MAX_REQUESTS: Final = 64
"""Requests that are answered or wait, until the last of the reply is sent; more are refused."""


class Desk:
    """Belongs to the event loop that it is used on."""

    def __init__(self) -> None:
        self._worker = Worker("fedbpt-serve")
        self._tickets: set[Ticket] = set()
        self._lock = threading.Lock()
        self._line: deque[Ticket] = deque()
        self._works = False

    @property
    def is_full(self) -> bool:
        return len(self._tickets) >= MAX_REQUESTS

    def take(self, begins: Sequence[Callable[[], Answer]]) -> Ticket:
        """Compute the answers of one request, in order. The ticket holds a place until it is closed."""
        ticket = Ticket(begins, self._tickets.discard)
        self._tickets.add(ticket)
        with self._lock:
            self._line.append(ticket)
            if not self._works:
                self._works = True
                self._worker.submit(self._work)
        return ticket

    def stop(self) -> None:
        """Cancel all answers."""
        for ticket in list(self._tickets):
            ticket.close()

    def close(self) -> bool:
        """`stop`, and whether the thread ended in time."""
        self.stop()
        return self._worker.close()

    def _work(self) -> None:
        """On the worker's thread, while there is something to do."""
        while True:
            with self._lock:
                if not self._line:
                    self._works = False
                    return
                ticket = self._line.popleft()
            goes_on = ticket.turn()
            with self._lock:
                is_alone = not self._line
                if goes_on:
                    self._line.append(ticket)
            if goes_on and not is_alone:
                ticket.pause()


class Ticket:
    """The answers to one request: ``jobs``, of which one is computed at a time."""

    def __init__(self, begins: Sequence[Callable[[], Answer]], closed: Callable[[Ticket], None]) -> None:
        self.jobs = [Job(begin) for begin in begins]
        self._closed = closed
        self._at = 0

    def close(self) -> None:
        """Cancel what is not computed yet, and give back the place. Harmless when it is closed."""
        for job in self.jobs:
            job.cancel()
        self._closed(self)

    def turn(self) -> bool:
        """On the worker's thread: compute a slice; whether there is more to do."""
        if self.jobs[self._at].advance():
            self._at += 1
        return self._at < len(self.jobs)

    def pause(self) -> None:
        """On the worker's thread, between two turns."""
        self.jobs[self._at].pause()


class Job:
    """An answer that is computed, or waits to be."""

    def __init__(self, begin: Callable[[], Answer]) -> None:
        self._begin = begin
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Answer | Piece | Exception | None] = asyncio.Queue()
        self._answer: Answer | None = None
        self._cancelled = False

    async def begun(self) -> Answer:
        """When it is its turn. Raises what beginning it raised."""
        item = await self._items.get()
        if isinstance(item, Exception):
            raise item
        if self._answer is None:
            raise FedbptError("the answer was cancelled before its turn came")
        return self._answer

    async def pieces(self) -> AsyncIterator[Piece]:
        """After `begun`. Raises what computing it raised."""
        while (item := await self._items.get()) is not None:
            if isinstance(item, Exception):
                raise item
            if isinstance(item, Piece):
                yield item

    def cancel(self) -> None:
        """It ends within a graph, or never begins. Harmless afterwards."""
        self._cancelled = True
        if self._answer is not None:
            self._answer.cancel()

    # --- on the worker's thread ----------------------------------------------------------------------------------

    def advance(self) -> bool:
        """Compute a slice of the answer; whether it is over."""
        try:
            over = self._compute()
        except Exception as error:  # noqa: BLE001 - raised where the answer is awaited
            self._end(error)
            return True
        if over:
            self._end(None)
        return over

    def pause(self) -> None:
        """Let another text have the generator."""
        if self._answer is not None:
            self._answer.pause()

    def _compute(self) -> bool:
        if self._answer is None:
            if self._cancelled:
                return True
            self._answer = self._begin()
            self._put(self._answer)
        for _ in range(SLICE):
            if self._cancelled:  # before this thread knew the answer
                raise ScoringInterrupted("the text was interrupted")
            piece = next(self._answer, None)
            if piece is None:
                return True
            self._put(piece)
        return False

    def _end(self, last: Exception | None) -> None:
        if self._answer is not None:
            self._answer.close()
        self._put(last)

    def _put(self, item: Answer | Piece | Exception | None) -> None:
        if not self._loop.is_closed():  # the server is gone, and with it who waits
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
