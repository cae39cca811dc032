"""`Scheduler`: computes completions on one thread, several in one pass, and delivers their pieces on the event loop.

As many texts are generated at a time as the generator has places for, and as together fit into its context, so that
their KV takes no more memory than that of one long text. Where more wait, they take turns, `SLICE` tokens each, request
by request: neither a long completion nor a request with many prompts delays the others.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final, cast

from fedbpt.device.agent.worker import Worker
from fedbpt.engine.text_stream import SLICE, Generation, Piece, next_of_all
from fedbpt.errors import FedbptError
from fedbpt.serving.models import Completion

MAX_REQUESTS: Final = 1024
"""Maximum number of requests that are processed or waiting, each with a connection; more are rejected."""


class Scheduler:
    """Use it on one event loop."""

    def __init__(self) -> None:
        self._worker = Worker("fedbpt-serve")
        self._tickets: set[Ticket] = set()
        self._lock = threading.Lock()
        self._queue: deque[Ticket] = deque()  # each has waiting jobs
        self._is_running = False
        self._active: list[tuple[Ticket, Job]] = []

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

    # --- on the worker's thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        """Process the queue until it is empty."""
        while self._admit():
            self._step()

    def _admit(self) -> bool:
        """Begin completions while there is room. Returns whether any is being computed."""
        while True:
            with self._lock:
                if not self._queue:
                    self._is_running = bool(self._active)
                    return self._is_running
                if self._active and len(self._active) >= self._active[0][1].generation.n_places:
                    return True
                ticket = self._queue.popleft()
                job = ticket.waiting.popleft()
                if ticket.waiting:
                    self._queue.append(ticket)
            if not job.begin():
                if self._active:  # a label took its turn
                    return True
                continue
            self._active.append((ticket, job))
            if not self._fits():
                self._send_back(len(self._active) - 1, first=True)
                return True

    def _step(self) -> None:
        """Compute a token of each active completion."""
        try:
            found = next_of_all([job.generation for _, job in self._active])
        except Exception as error:  # noqa: BLE001 - raised where the completions are awaited
            found = [error] * len(self._active)
        going = [job.take(piece) for (_, job), piece in zip(self._active, found, strict=True)]
        self._active = [pair for pair, goes in zip(self._active, going, strict=True) if goes]
        n_waiting = self._n_waiting
        for pair in [pair for pair in self._active if pair[1].may_pause]:  # the longest under way first
            if n_waiting > 0 or not self._fits():
                self._send_back(self._active.index(pair))
                n_waiting -= 1

    def _fits(self) -> bool:
        """Whether the active texts fit into the context together, with their next slices; one always does."""
        texts = [job.generation for _, job in self._active]
        return len(texts) < 2 or sum(text.n_prompt + text.n_tokens + SLICE for text in texts) <= texts[0].n_ctx

    @property
    def _n_waiting(self) -> int:
        with self._lock:
            return sum(len(ticket.waiting) for ticket in self._queue)

    def _send_back(self, i: int, first: bool = False) -> None:
        """Let an active completion wait for its next turn; ``first``: the next one."""
        ticket, job = self._active.pop(i)
        job.generation.pause()
        with self._lock:
            ticket.waiting.appendleft(job)
            if ticket in self._queue:
                self._queue.remove(ticket)
            if first:
                self._queue.appendleft(ticket)
            else:
                self._queue.append(ticket)


class Ticket:
    """The completions of one request, as ``jobs``, of which those in ``waiting`` are not being computed."""

    def __init__(self, starts: Sequence[Callable[[], Completion]], on_close: Callable[[Ticket], None]) -> None:
        self.jobs = [Job(start) for start in starts]
        self.waiting = deque(self.jobs)
        self._on_close = on_close

    def close(self) -> None:
        """Cancel unfinished completions and free the slot. Idempotent."""
        for job in self.jobs:
            job.cancel()
        self._on_close(self)


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

    @property
    def generation(self) -> Generation:
        """The text that is being generated; only of a job that `begin` left unfinished."""
        return cast(Generation, self._completion)

    def begin(self) -> bool:
        """Start or continue. Returns whether there are tokens to generate; a label is computed here."""
        if self._completion is not None:
            return True
        if self._cancelled:
            return self._end(None)
        try:
            self._completion = self._start()
            if self._cancelled:  # meanwhile
                self._completion.cancel()
            self._put(self._completion)
            if isinstance(self._completion, Generation):
                return True
            for piece in self._completion:
                self._put(piece)
        except Exception as error:  # noqa: BLE001 - raised where the completion is awaited
            return self._end(error)
        return self._end(None)

    def take(self, piece: Piece | Exception | None) -> bool:
        """Deliver a piece, or the end. Returns whether more follows."""
        if not isinstance(piece, Piece):
            return self._end(piece)
        self._put(piece)
        return True

    @property
    def may_pause(self) -> bool:
        """Whether it is at the end of a slice."""
        text = self.generation
        return text.n_tokens > 0 and text.n_tokens % SLICE == 0 and text.waits

    def _end(self, last: Exception | None) -> bool:
        if self._completion is not None:
            self._completion.close()
        self._put(last)
        return False

    def _put(self, item: Completion | Piece | Exception | None) -> None:
        if not self._loop.is_closed():  # closed: the server has stopped, and nobody waits
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
