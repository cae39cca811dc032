"""A coordinator in a separate process, which can be killed by SIGKILL at its n-th SQL statement.

SQLite reports each statement before running it: BEGIN, each INSERT and UPDATE, COMMIT. So these points are before and
after every write and commit of the coordinator, without a change in its code.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fedbpt.aggregation.pooled import Pooled
from fedbpt.coordinator.clients import HttpClient
from fedbpt.coordinator.federation import Federation
from fedbpt.protocol import codec
from fedbpt.runs import store
from fedbpt.runs.result import RunResult
from tests.support.toy_scene import ToyTask, settings

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])

DIES = -signal.SIGKILL


def run(path: Path, urls: Sequence[str], kill_at: int, clock_s: float, count: Any, changes: dict[str, Any]) -> None:
    """Run the coordinator. ``kill_at``: number of the statement at which to die; 0: none. ``count``: of statements.

    ``clock_s``: error of the wall clock, whose sign changes at every reading.
    """
    if clock_s:
        right = time.time
        signs = itertools.cycle((1.0, -1.0))

        def wrong() -> float:
            return right() + next(signs) * clock_s

        time.time = wrong
        store._now = lambda: datetime.fromtimestamp(wrong(), timezone.utc).isoformat()

    def statement(_sql: str) -> None:
        count.value += 1
        if count.value == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    clients = [HttpClient(url, name=f"device-{number}", retry_s=8.0, response_s=1.0) for number, url in enumerate(urls)]
    chosen = settings(**{"rounds": 4, "deadline_s": 60.0, "quorum": 1.0, "stragglers": 0.0, **changes})
    with store.RunStore(path) as opened:
        opened._db.set_trace_callback(statement)
        Federation(clients, ToyTask(), chosen, Pooled(4, popsize=6, seed=3), opened, "r").run()


class Coordinator:
    """One session of the run stored at ``path``."""

    def __init__(self, path: Path, urls: Sequence[str], kill_at: int = 0, clock_s: float = 0.0, **changes: Any) -> None:
        self._count = _CONTEXT.Value("i", 0)
        self.process = _CONTEXT.Process(target=run, args=(path, list(urls), kill_at, clock_s, self._count, changes))
        self.process.start()

    def wait(self, timeout_s: float = 120.0) -> int:
        """Wait for the exit code, which is below 0 after a signal; kills the process after ``timeout_s``."""
        self.process.join(timeout_s)
        if self.process.is_alive():
            self.kill()
            raise AssertionError(f"the coordinator did not end within {timeout_s:g} s")
        return int(self.process.exitcode or 0)

    def kill(self) -> None:
        if self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    @property
    def statements(self) -> int:
        return int(self._count.value)


def digest(path: Path) -> str:
    """The final digest of the finished run at ``path``."""
    with store.RunStore(path) as opened:
        stored = opened.get_run("r")
    assert stored.status == "finished"
    assert stored.result is not None
    return codec.decode(stored.result, RunResult).digest
