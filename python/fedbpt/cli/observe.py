"""Who watches a run that ``fedbpt tune`` coordinates: a log file, and the monitor that people and Prometheus read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedbpt.cli.credentials import token_in
from fedbpt.cli.reach import host_and_port
from fedbpt.coordinator.monitor import MonitorServer
from fedbpt.errors import ConfigError
from fedbpt.journal import Journal, LogFile, Sink
from fedbpt.runs import EventCallback
from fedbpt.tls import Tls


@dataclass(frozen=True)
class Observers:
    """``log``: a file for lines of JSON. ``monitor``: HOST:PORT; ``token``: a file with what its readers send."""

    log: Path | None = None
    monitor: str | None = None
    token: Path | None = None
    tls: Tls | None = None
    allow_insecure: bool = False

    def __post_init__(self) -> None:
        if self.token is not None and self.monitor is None:
            raise ConfigError("--monitor-token is for the readers of --monitor HOST:PORT: give that, too")

    @contextmanager
    def watching(self, store: Path, run: str, tell: Callable[[str], None]) -> Iterator[EventCallback]:
        """What the run's events are to be told, meanwhile. ``tell``: called with the monitor's address."""
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
            journal = Journal(*sinks)
            stack.enter_context(journal.hearing_warnings())
            yield journal
