"""`RunsDashboardServer`: the pages of a coordinator's runs, one for each, from its own thread and event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from weakref import WeakSet

from fedbpt.coordinator.control import RunControl
from fedbpt.dashboard.guard import Guard
from fedbpt.dashboard.server import POLL_S
from fedbpt.dashboard.state import RunState, try_to_refresh
from fedbpt.errors import MissingExtraError
from fedbpt.net.auth import check_token
from fedbpt.net.server import HttpServer
from fedbpt.net.tls import Tls
from fedbpt.runs.event_log import Sink
from fedbpt.runs.store import RunStore
from fedbpt.runs.submission import Job

log = logging.getLogger(__name__)


class RunsDashboardServer(HttpServer):
    """Serves a list of runs and a page for each. One per process. Arguments and errors as `DashboardServer`.

    Args:
        jobs: returns the runs that were handed in.
    """

    def __init__(
        self,
        store: Path,
        jobs: Callable[[], Sequence[Job]],
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        allow_insecure: bool = False,
    ) -> None:
        try:
            from fedbpt.dashboard.app import build_runs_app
            from fedbpt.dashboard.invitation import links
        except ImportError as error:
            raise MissingExtraError("the dashboard", "dashboard") from error
        check_token(token, host, "--dashboard-token")
        self._jobs = jobs
        self._lock = threading.Lock()
        self._running: tuple[RunState, RunControl] | None = None
        self._shown: WeakSet[RunState] = WeakSet()  # states of open pages
        self._store = RunStore(store)
        self._polling: asyncio.Task[None] | None = None
        try:
            pages = build_runs_app(jobs, self.find, lambda: self.watch_link, self._on_startup, self._on_shutdown)
            super().__init__(Guard(pages, token), host, port, tls=tls, allow_insecure=allow_insecure, websockets=True)
        except BaseException:
            self._store.close()
            raise
        found = links(host, self.port, tls is not None and tls.serves, token)
        self.link: str = found.operators
        """The operator's link: the address with the token."""
        self.watch_link: str | None = found.everybodys
        """The read-only link for other machines; None: only this machine can reach the dashboard."""

    @contextmanager
    def watch(self, run: str, control: RunControl) -> Iterator[Sink]:
        """Show ``run``, with its controls, while it runs within the block."""
        state = RunState(run, control)
        with self._lock:
            self._running = state, control
            self._shown.add(state)
        try:
            yield state
        finally:
            with self._lock:
                self._running = None
            state.stopped()

    def find(self, run: str) -> tuple[RunState, RunControl | None] | None:
        """The state of a run, and its control while it runs; None: there is no such run."""
        with self._lock:
            if self._running is not None and self._running[0].run == run:
                return self._running
        if self._store.find_run(run) is None and run not in {job.run for job in self._jobs()}:
            return None
        state = RunState(run)
        try_to_refresh(state, self._store)
        with self._lock:
            self._shown.add(state)
        return state, None

    def stop(self) -> None:
        super().stop()
        self._store.close()

    # --- on the server's loop ------------------------------------------------------------------------------------

    async def _on_startup(self) -> None:
        self._polling = asyncio.ensure_future(self._poll_store())

    async def _on_shutdown(self) -> None:
        if self._polling is not None:
            self._polling.cancel()
            with suppress(asyncio.CancelledError):
                await self._polling

    async def _poll_store(self) -> None:
        while True:
            with self._lock:
                shown = list(self._shown)
            for state in shown:
                await asyncio.to_thread(try_to_refresh, state, self._store)
            del shown
            await asyncio.sleep(POLL_S)
