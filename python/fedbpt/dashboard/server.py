"""`DashboardServer`: serves a run's pages from its own thread and event loop, so that they never delay the run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, Final

from fedbpt.coordinator.clients import DeviceClient
from fedbpt.coordinator.control import RunControl
from fedbpt.dashboard.comparison import Comparison
from fedbpt.dashboard.guard import Guard
from fedbpt.dashboard.heartbeat import Heartbeat
from fedbpt.dashboard.state import RunState, try_to_refresh
from fedbpt.dashboard.visits import Visits
from fedbpt.errors import FedbptError, MissingExtraError
from fedbpt.net.auth import check_token
from fedbpt.net.server import HttpServer
from fedbpt.net.tls import Tls
from fedbpt.runs.event_log import Line
from fedbpt.runs.store import RunStore

log = logging.getLogger(__name__)

POLL_S: Final = 1.0
"""Interval between two reads of the store, in seconds."""


class DashboardServer(HttpServer):
    """Serves the dashboard of a run, and is a `fedbpt.runs.event_log.Sink` for its events. One per process.

    Args:
        store: the run database, read through a separate connection.
        run: the run's name in it.
        host, port: see `HttpServer`.
        control: controls the run, if it is coordinated in this process; None: pages are read-only.
        token: what browsers must send to get controls; `watch_link` is read-only. None: loopback only.
        tls, allow_insecure: see `HttpServer`.

    Raises:
        ConfigError: a host beyond loopback without a token, or without TLS or ``allow_insecure``.
        MissingExtraError: NiceGUI is not installed.
    """

    def __init__(
        self,
        store: Path,
        run: str,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        control: RunControl | None = None,
        token: str | None = None,
        tls: Tls | None = None,
        allow_insecure: bool = False,
    ) -> None:
        try:
            from fedbpt.dashboard.app import build_app, n_pages
            from fedbpt.dashboard.invitation import links
        except ImportError as error:
            raise MissingExtraError("the dashboard", "dashboard") from error
        check_token(token, host, "--dashboard-token")
        self.state = RunState(run, control)
        self._n_pages = n_pages
        self._visits = Visits(n_pages)
        self.comparison: Comparison | None = None
        """What the compare page needs; set it from any thread."""
        self._store = RunStore(store)
        self._tasks: list[asyncio.Task[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        try:
            pages = build_app(
                self.state,
                control,
                lambda: self.comparison,
                lambda: self.watch_link,
                self._on_startup,
                self._on_shutdown,
            )
            app = Guard(pages, token, self._visits.record)
            super().__init__(app, host, port, tls=tls, allow_insecure=allow_insecure, websockets=True)
        except BaseException:
            self._store.close()
            raise
        self._links = links(host, self.port, tls is not None and tls.serves, token)

    @property
    def link(self) -> str:
        """The operator's link: the address with the token."""
        return self._links.operators

    @property
    def watch_link(self) -> str | None:
        """The read-only link for other machines; None: only this machine can reach the dashboard."""
        return self._links.everybodys

    def __call__(self, line: Line) -> str:
        return self.state(line)

    def watch(self, clients: Sequence[DeviceClient]) -> None:
        """Start polling ``clients`` for whether they respond. Raises `FedbptError` if the server is not running."""
        if self._loop is None:
            raise FedbptError("the dashboard is not running: start it first")
        heartbeat = Heartbeat(clients, self.state.set_responding, self.state.set_info)
        self._loop.call_soon_threadsafe(lambda: self._spawn(heartbeat.run()))

    @property
    def n_pages(self) -> int:
        """Number of open pages."""
        return self._n_pages()

    def is_watched(self) -> bool:
        """Whether a page is open, or was requested or open within `fedbpt.dashboard.visits.AWAY_S`. From any thread."""
        return self._visits.are_recent()

    def stop(self) -> None:
        super().stop()
        self._store.close()

    # --- on the server's loop ------------------------------------------------------------------------------------

    async def _on_startup(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._spawn(self._poll_store())

    async def _on_shutdown(self) -> None:
        if self.comparison is not None:
            await self.comparison.aclose()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        task.add_done_callback(_log_failure)
        self._tasks.append(task)

    async def _poll_store(self) -> None:
        while True:
            self.is_watched()
            await asyncio.to_thread(try_to_refresh, self.state, self._store)
            await asyncio.sleep(POLL_S)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a part of the dashboard failed; the run continues", exc_info=error)
