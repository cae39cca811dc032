"""Who watches a run that ``fedbpt tune`` coordinates: a log file, the monitor for tools, the dashboard for people."""

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
from fedbpt.coordinator.monitor import MonitorServer
from fedbpt.errors import ConfigError
from fedbpt.net.tls import Tls
from fedbpt.runs.event_log import Journal, LogFile, Sink
from fedbpt.runs.events import Event

if TYPE_CHECKING:
    from fedbpt.dashboard.comparing import Comparison
    from fedbpt.dashboard.server import DashboardServer

FAREWELL_S: Final = 1.5
"""How long open pages may take to show that the run was stopped."""

LOOK_S: Final = 0.2
"""Between two looks whether a page is still open."""


class Watch:
    """A run's observers, while it lasts: an `fedbpt.runs.events.EventCallback`."""

    def __init__(self, journal: Journal, dashboard: DashboardServer | None) -> None:
        self._journal, self._dashboard = journal, dashboard
        self._clients: Sequence[DeviceClient] = ()

    def __call__(self, event: Event) -> None:
        self._journal(event)

    def meet(self, clients: Sequence[DeviceClient]) -> None:
        """These are the run's devices: the dashboard asks them for their pulse."""
        self._clients = clients
        if self._dashboard is not None:
            self._dashboard.watch(clients)

    @property
    def devices(self) -> list[RemoteDevice]:
        """Other clients of the run's devices, for the dashboard's event loop."""
        return [client.twin() for client in self._clients if isinstance(client, RemoteDevice)]

    def compare(self, comparison: Comparison) -> None:
        """The run is finished: visitors of the dashboard may compare what it tuned with the original."""
        if self._dashboard is not None:
            self._dashboard.comparison = comparison
            if self._dashboard.is_watched():
                comparison.look_for_examples()

    def linger(self, tell: Callable[[str], None]) -> None:
        """Keep a finished run on the screen until its last page is closed, or Ctrl-C."""
        if self._dashboard is None or not self._dashboard.is_watched():
            return
        tell("the dashboard stays until its pages are closed; Ctrl-C ends it now")
        try:
            while self._dashboard.is_watched():
                time.sleep(LOOK_S)
        except KeyboardInterrupt:
            return  # the run is finished: nothing is interrupted

    def stopped(self) -> None:
        """The run ends without a result."""
        if self._dashboard is not None:
            self._dashboard.state.stopped()
            if self._dashboard.n_pages:
                time.sleep(FAREWELL_S)


@dataclass(frozen=True)
class Observers:
    """``log``: a file for lines of JSON. ``monitor``, ``dashboard``: HOST:PORT; their ``token``: a file with what their
    readers send. ``control``: what the dashboard steers the run by; ``dashboard_secret``: a token that is in no file.
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
            raise ConfigError("--monitor-token is for the readers of --monitor HOST:PORT: give that, too")
        if self.dashboard_token is not None and self.dashboard is None:
            raise ConfigError("--dashboard-token is for the readers of --dashboard HOST:PORT: give that, too")

    @contextmanager
    def watching(self, store: Path, run: str, tell: Callable[[str], None]) -> Iterator[Watch]:
        """What the run's events are to be told, meanwhile. ``tell``: called with the servers' addresses."""
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
                tell_how_to_watch(dashboard, tell)
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


def tell_how_to_watch(dashboard: DashboardServer, tell: Callable[[str], None]) -> None:
    """The link for people on other machines, who cannot steer; in a terminal with a QR code of it."""
    link = dashboard.watch_link
    if link is None:
        return
    tell(f"to watch it from elsewhere, without the controls: {link}")
    if sys.stderr.isatty():
        from fedbpt.dashboard.invitation import qr_lines

        for line in qr_lines(link):
            tell(line)
