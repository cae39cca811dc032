"""`RunControl`: pause, resume and stop a run while it goes on. The round loop reads it between rounds."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, TypeVar

from fedbpt.errors import ConfigError, RunStopped

T = TypeVar("T")


class Wish(NamedTuple):
    """What the next round is to do. ``deadline_s`` None: the run's settings."""

    paused: bool = False
    deadline_s: float | None = None


class RunControl:
    """Controls one run of a `fedbpt.coordinator.federation.Federation`. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wish = Wish()
        self._stopped = False
        self._cancel: Callable[[], object] = lambda: None

    @property
    def wish(self) -> Wish:
        return self._wish

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped

    def pause(self) -> None:
        """Begin no more rounds; the open one is finished."""
        with self._lock:
            self._wish = self._wish._replace(paused=True)

    def resume(self) -> None:
        """Continue after `pause`."""
        with self._lock:
            self._wish = self._wish._replace(paused=False)

    def set_deadline(self, seconds: float) -> None:
        """Set the time limit of rounds, from the next one on, in this session. Raises `ConfigError` unless > 0."""
        if not (math.isfinite(seconds) and seconds > 0):
            raise ConfigError(f"invalid deadline of {seconds:g} s: give more than 0 seconds", field="deadline_s")
        with self._lock:
            self._wish = self._wish._replace(deadline_s=float(seconds))

    def stop(self) -> None:
        """End the run as Ctrl-C does: devices stop, closed rounds are kept, and the same call resumes it."""
        with self._lock:
            self._stopped = True
            self._cancel()

    async def unless_stopped(self, work: Coroutine[Any, Any, T]) -> T:
        """Await ``work``; if `stop` is called, cancel it and raise `RunStopped`."""
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(work)
        with self._lock:
            if self._stopped:
                task.cancel()
            self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
        try:
            return await task
        except asyncio.CancelledError:
            if self._stopped:
                raise RunStopped("the run was stopped: start it again to resume it") from None
            raise
        finally:
            with self._lock:  # after this the loop may be closed
                self._cancel = lambda: None
