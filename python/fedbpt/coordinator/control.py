"""`RunControl`: how people steer a run while it is under way. The round loop asks it between rounds."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, TypeVar

from fedbpt.errors import ConfigError, RunStopped

T = TypeVar("T")


class Wish(NamedTuple):
    """What is wanted of the next round. ``deadline_s`` None: as the run's settings say."""

    paused: bool = False
    deadline_s: float | None = None


class RunControl:
    """Pause, resume, stop, another deadline: from any thread, for one run of one
    `fedbpt.coordinator.federation.Federation`.
    """

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
        """No round begins from now on; the one under way is finished."""
        with self._lock:
            self._wish = self._wish._replace(paused=True)

    def resume(self) -> None:
        """Go on after `pause`."""
        with self._lock:
            self._wish = self._wish._replace(paused=False)

    def set_deadline(self, seconds: float) -> None:
        """Longest that a round may take, from the next one on, in this sitting. Raises `ConfigError` unless > 0."""
        if not (math.isfinite(seconds) and seconds > 0):
            raise ConfigError(f"a deadline of {seconds:g} s cannot be: give a number of seconds above 0")
        with self._lock:
            self._wish = self._wish._replace(deadline_s=float(seconds))

    def stop(self) -> None:
        """End the run as Ctrl-C does: devices are told, closed rounds stay, and the same call resumes it."""
        with self._lock:
            self._stopped = True
            self._cancel()

    async def unless_stopped(self, work: Coroutine[Any, Any, T]) -> T:
        """What ``work`` returns. Raises `RunStopped`, with ``work`` cancelled, when `stop` is called."""
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
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
            with self._lock:  # the loop may be closed from now on
                self._cancel = lambda: None
