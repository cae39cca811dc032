"""`Worker`: one thread that runs jobs one after the other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class Worker:
    """Runs what is submitted, in order, on one thread that starts with the first job.

    Give one worker to several services whose devices share a scorer, so that they take turns. The thread is a
    daemon: a scoring call that cannot be interrupted must not keep a process alive that was asked to stop.
    """

    def __init__(self, name: str = "fedbpt-worker") -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def submit(self, job: Callable[[], None]) -> None:
        """Queue ``job``. It must not raise."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():  # as after a fork: threads stay behind
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._jobs.put(job)

    def close(self, timeout_s: float = 5.0) -> bool:
        """Let queued jobs end, then stop; returns whether they ended in time. A later submit starts anew."""
        with self._lock:
            thread, self._thread = self._thread, None
            if thread is None:
                return True
            jobs, self._jobs = self._jobs, queue.SimpleQueue()
            jobs.put(None)
        thread.join(timeout_s)
        return not thread.is_alive()

    def _run(self) -> None:
        jobs = self._jobs
        while (job := jobs.get()) is not None:
            job()
