"""`Worker`: a thread that runs jobs one at a time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class Worker:
    """Runs jobs in the order of submission on one thread, which starts with the first job.

    Services whose devices share a scorer must share a worker. The thread is a daemon, so that a scoring call that
    cannot be interrupted does not keep a stopping process alive.
    """

    def __init__(self, name: str = "fedbpt-worker") -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def submit(self, job: Callable[[], None]) -> None:
        """Queue ``job``. It must not raise."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():  # a fork does not copy threads
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._jobs.put(job)

    def close(self, timeout_s: float = 5.0) -> bool:
        """Finish the queued jobs, then stop; returns whether they ended in time. `submit` restarts the worker."""
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
