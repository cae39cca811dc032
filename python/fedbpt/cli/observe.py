"""Observers of a run of ``fedbpt tune``: a log file, the monitor for tools, the dashboard for people."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedbpt.cli.credentials import token_in
from fedbpt.cli.reach import host_and_port
from fedbpt.coordinator.clients import DeviceClient, RemoteDevice
from fedbpt.coordinator.control import RunControl
from fedbpt.coordinator.monitoring.monitor import MonitorServer
from fedbpt.errors import ConfigError
from fedbpt.net.tls import Tls
from fedbpt.runs.event_log import Journal, LogFile, Sink
from fedbpt.runs.events import Event

if TYPE_CHECKING:
    from fedbpt.dashboard.comparison import Comparison
    from fedbpt.dashboard.server import DashboardServer

FAREWELL_S: Final = 1.5
"""How long open pages have to show that the run was stopped, in seconds."""

POLL_S: Final = 0.2
"""Interval between two checks for open pages, in seconds."""


class Watch:
    """The active observers of a run: an `fedbpt.runs.events.EventCallback`."""

    def __init__(self, journal: Journal, dashboard: DashboardServer | None) -> None:
        self._journal = journal
        self._dashboard = dashboard
        self._clients: Sequence[DeviceClient] = ()

    def __call__(self, event: Event) -> None:
        self._journal(event)

    def meet(self, clients: Sequence[DeviceClient]) -> None:
        """Set the run's devices, whose liveness the dashboard shows."""
        self._clients = clients
        if self._dashboard is not None:
            self._dashboard.watch(clients)

    @property
    def devices(self) -> list[RemoteDevice]:
        """Separate clients for the run's devices, for the dashboard's event loop."""
        return [client.twin() for client in self._clients if isinstance(client, RemoteDevice)]

    def compare(self, comparison: Comparison) -> None:
        """Open the dashboard's compare page, once the run is finished."""
        if self._dashboard is not None:
            self._dashboard.comparison = comparison
            if self._dashboard.is_watched():
                comparison.start_examples()

    def wait_for_pages(self, tell: Callable[[str], None]) -> None:
        """Keep the dashboard of a finished run running until its last page is closed, or Ctrl-C."""
        if self._dashboard is None or not self._dashboard.is_watched():
            return
        tell("the dashboard runs until its pages are closed; Ctrl-C stops it now")
        try:
            while self._dashboard.is_watched():
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            return  # the run is finished, so no work is interrupted

    def stopped(self) -> None:
        """Show on open pages that the run ends without a result."""
        if self._dashboard is not None:
            self._dashboard.state.stopped()
            if self._dashboard.n_pages:
                time.sleep(FAREWELL_S)


@dataclass(frozen=True)
class Observers:
    """Settings of the observers.

    Args:
        log: file to append events to, as lines of JSON.
        monitor: HOST:PORT of the monitor.
        token: file of the token that the monitor's clients must send.
        dashboard: HOST:PORT of the dashboard.
        dashboard_token: file of the token that browsers must send.
        control: through which the dashboard pauses and stops the run.
        dashboard_secret: the dashboard's token if there is no file of it.
    """

    log: Path | None = None
    monitor: str | None = None
    token: Path | None = None
    tls: Tls | None = None
    allow_insecure: bool = False
    dashboard: str | None = None
    dashboard_token: Path | None = None
    control: RunControl = field(default_factory=RunControl)
    dashboard_secret: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.token is not None and self.monitor is None:
            raise ConfigError("--monitor-token needs --monitor HOST:PORT: give both", field="--monitor-token")
        if self.dashboard_token is not None and self.dashboard is None:
            raise ConfigError("--dashboard-token needs --dashboard HOST:PORT: give both", field="--dashboard-token")

    @contextmanager
    def watching(self, store: Path, run: str, tell: Callable[[str], None]) -> Iterator[Watch]:
        """Run the observers within the block, which passes events to the `Watch`. ``tell``: called with addresses."""
        with ExitStack() as stack:
            sinks: list[Sink] = []
            if self.log is not None:
                sinks.append(stack.enter_context(LogFile(self.log)))
            if self.monitor is not None:
                host, port = host_and_port("--monitor", self.monitor)
                token = None if self.token is None else token_in(self.token)
                server = MonitorServer(
                    store, run, host, port, token=token, tls=self.tls, allow_insecure=self.allow_insecure
                )
                sinks.append(stack.enter_context(server))
                tell(f"monitor at {server.url}")
            dashboard = self._dashboard_server(store, run)
            if dashboard is not None:
                sinks.append(stack.enter_context(dashboard))
                tell(f"dashboard at {dashboard.link}")
                print_watch_link(dashboard, tell)
            journal = Journal(*sinks)
            stack.enter_context(journal.hearing_warnings())
            watch = Watch(journal, dashboard)
            try:
                yield watch
            except BaseException:
                watch.stopped()
                raise

    def _dashboard_server(self, store: Path, run: str) -> DashboardServer | None:
        if self.dashboard is None:
            return None
        from fedbpt.dashboard.server import DashboardServer

        host, port = host_and_port("--dashboard", self.dashboard)
        token = self.dashboard_secret if self.dashboard_token is None else token_in(self.dashboard_token)
        return DashboardServer(
            store, run, host, port, control=self.control, token=token, tls=self.tls, allow_insecure=self.allow_insecure
        )


def print_watch_link(dashboard: DashboardServer, tell: Callable[[str], None]) -> None:
    """Print the read-only link for people on other machines, in a terminal with its QR code."""
    link = dashboard.watch_link
    if link is None:
        return
    tell(f"read-only link for other machines: {link}")
    if sys.stderr.isatty():
        from fedbpt.dashboard.invitation import qr_lines

        for line in qr_lines(link):
            tell(line)
