"""`Desk`: one answer at a time, in the order of the requests; each comes out piece by piece on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Final

from fedbpt.agent.worker import Worker
from fedbpt.errors import FedbptError
from fedbpt.generation import Piece
from fedbpt.serving.answers import Answer

MAX_WAITING: Final = 64
"""Answers that wait for their turn; more are refused."""


class Desk:
    """Belongs to the event loop that it is used on; answers are computed on a thread of its own."""

    def __init__(self) -> None:
        self._worker = Worker("fedbpt-serve")
        self._jobs: set[Job] = set()

    @property
    def is_full(self) -> bool:
        return len(self._jobs) >= MAX_WAITING

    def submit(self, begin: Callable[[], Answer]) -> Job:
        """Compute an answer when it is its turn."""
        job = Job(begin, self._jobs.discard)
        self._jobs.add(job)
        self._worker.submit(job.run)
        return job

    def stop(self) -> None:
        """Cancel all answers."""
        for job in list(self._jobs):
            job.cancel()

    def close(self) -> bool:
        """`stop`, and whether the thread ended in time."""
        self.stop()
        return self._worker.close()


class Job:
    """An answer that is computed, or waits to be."""

    def __init__(self, begin: Callable[[], Answer], done: Callable[[Job], None]) -> None:
        self._begin, self._done = begin, done
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

    def run(self) -> None:
        """On the worker's thread."""
        try:
            if not self._cancelled:
                answer = self._answer = self._begin()
                self._put(answer)
                if self._cancelled:  # as it began
                    answer.cancel()
                for piece in answer:
                    self._put(piece)
            self._put(None)
        except Exception as error:  # noqa: BLE001 - raised where the answer is awaited
            self._put(error)
        finally:
            self._tell(lambda: self._done(self))

    def _put(self, item: Answer | Piece | Exception | None) -> None:
        self._tell(lambda: self._items.put_nowait(item))

    def _tell(self, what: Callable[[], None]) -> None:
        if not self._loop.is_closed():  # the server is gone, and with it who waits
            self._loop.call_soon_threadsafe(what)
