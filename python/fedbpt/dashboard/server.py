"""`DashboardServer`: a run's pages, served from a thread with an event loop of its own. The run waits for no page."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, Final

from fedbpt.coordinator.clients import DeviceClient
from fedbpt.coordinator.control import RunControl
from fedbpt.dashboard.comparing import Comparison
from fedbpt.dashboard.guard import Guard
from fedbpt.dashboard.pulse import Pulse
from fedbpt.dashboard.state import RunState
from fedbpt.dashboard.visits import Visits
from fedbpt.errors import FedbptError, MissingExtraError, StoreError
from fedbpt.net.auth import check_token
from fedbpt.net.server import HttpServer
from fedbpt.net.tls import Tls
from fedbpt.runs.event_log import Line
from fedbpt.runs.store import RunStore

log = logging.getLogger(__name__)

LOOK_S: Final = 1.0
"""Between two looks at the store."""


class DashboardServer(HttpServer):
    """Shows ``run`` of ``store``: a `fedbpt.runs.event_log.Sink` for its events. See `HttpServer`. One in a process.

    Args:
        store: the run database, read through a connection of its own.
        control: steers the run that is coordinated in this process; None: it is not, and can be watched only.
        token: what browsers must send to steer; those with `watch_link` only watch. None: loopback only.

    Raises:
        ConfigError: a host beyond loopback without token, or without TLS or ``allow_insecure``.
        MissingExtraError: without NiceGUI.
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
        """What visitors can compare; from any thread."""
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
            app = Guard(pages, token, self._visits.came)
            super().__init__(app, host, port, tls=tls, allow_insecure=allow_insecure, websockets=True)
        except BaseException:
            self._store.close()
            raise
        self._links = links(host, self.port, tls is not None and tls.serves, token)

    @property
    def link(self) -> str:
        """What the operator opens: the address, with the token."""
        return self._links.operators

    @property
    def watch_link(self) -> str | None:
        """For those who may look but not steer, from their own machines; None: only this machine can reach it."""
        return self._links.everybodys

    def __call__(self, line: Line) -> str:
        return self.state(line)

    def watch(self, clients: Sequence[DeviceClient]) -> None:
        """Ask ``clients`` for their pulse from now on."""
        if self._loop is None:
            raise FedbptError("the dashboard does not run: start it first")
        pulse = Pulse(clients, self.state.heard, self.state.met)
        self._loop.call_soon_threadsafe(lambda: self._spawn(pulse.run()))

    @property
    def n_pages(self) -> int:
        """How many pages are open now."""
        return self._n_pages()

    def is_watched(self) -> bool:
        """Whether a page is open, or was asked for or open within `fedbpt.dashboard.visits.AWAY_S`. From any thread."""
        return self._visits.are_on()

    def stop(self) -> None:
        super().stop()
        self._store.close()

    # --- on the server's loop ------------------------------------------------------------------------------------

    async def _on_startup(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._spawn(self._keep_looking())

    async def _on_shutdown(self) -> None:
        if self.comparison is not None:
            await self.comparison.aclose()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        task.add_done_callback(_tell_failure)
        self._tasks.append(task)

    async def _keep_looking(self) -> None:
        while True:
            self.is_watched()
            await asyncio.to_thread(self._look)
            await asyncio.sleep(LOOK_S)

    def _look(self) -> None:
        try:
            self.state.look(self._store)
        except StoreError as error:  # the next look may do better; the run has a connection of its own
            log.warning("the dashboard cannot read the run: %s", error)


def _tell_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a part of the dashboard failed; the run goes on", exc_info=error)
