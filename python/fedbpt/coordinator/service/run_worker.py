"""`RunWorker`: runs the runs of a `RunQueue` one after the other, over the devices that call in.

One at a time, since a device works on one run at a time, and a run may need all of them. Devices stay enrolled and
connected between runs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from fedbpt.coordinator.control import RunControl
from fedbpt.coordinator.devices.drafting import draft
from fedbpt.coordinator.devices.enrolment import DeviceRegistry
from fedbpt.coordinator.federation import Federation
from fedbpt.coordinator.gc_policy import collect_between_rounds, collect_normally
from fedbpt.coordinator.ledger import has_result
from fedbpt.coordinator.monitoring.feed import EventFeed
from fedbpt.coordinator.service.run_queue import RunQueue
from fedbpt.coordinator.service.server import CoordinatorServer
from fedbpt.errors import MAX_MESSAGE_CHARS, CoordinatorRefusedError, FedbptError, RunStopped
from fedbpt.faults import public_reason
from fedbpt.plain_text import one_line
from fedbpt.runs.event_log import Journal, LogFile, Sink
from fedbpt.runs.events import Evaluated, Event, RoundClosed, RunStarted
from fedbpt.runs.result import RunResult
from fedbpt.runs.store import RunStore
from fedbpt.runs.submission import Job, Submission

log = logging.getLogger(__name__)


class Current(NamedTuple):
    """The run that is running. ``feed``: its events, for those who follow it."""

    run: str
    control: RunControl
    feed: EventFeed


@contextmanager
def unwatched(_run: str, _control: RunControl) -> Iterator[Sink]:
    """A sink that ignores events."""
    yield lambda _line: ""


class RunWorker:
    """Runs the queued runs in a thread, from `start` to `stop`. The other methods are safe to use from any thread.

    Args:
        queue, store, registry: the runs that were handed in, their rounds, and the devices.
        logs: folder of the runs' event logs, ``NAME.jsonl``.
        wait_s: how long a run waits for its devices, in seconds.
        tell: called with a line when a run begins, waits or ends.
        watch: called with the name and control of each run that begins; the context, until its end, of another sink.
    """

    def __init__(
        self,
        queue: RunQueue,
        store: RunStore,
        registry: DeviceRegistry,
        logs: Path,
        wait_s: float,
        tell: Callable[[str], None] = lambda _line: None,
        watch: Callable[[str, RunControl], AbstractContextManager[Sink]] = unwatched,
    ) -> None:
        self.queue = queue
        self.store = store
        self._registry = registry
        self._logs = logs
        self._wait_s = wait_s
        self._tell = tell
        self._watch = watch
        self._lock = threading.Lock()
        self._current: Current | None = None
        self._waits_for = ""
        self._cancelled = ""
        self._over_quota = ""
        self._woken = threading.Event()
        self._stopping = False
        # Not `Thread.join`: Ctrl-C within it makes Python up to 3.12 take the thread for ended.
        self._ended = threading.Event()
        self._ended.set()
        self.failure: BaseException | None = None
        """What ended the thread, other than `stop`."""

    def start(self, server: CoordinatorServer) -> None:
        """Begin, with the run that was running when the coordinator was stopped, if any."""
        self._ended.clear()
        try:
            threading.Thread(target=self._work, args=(server,), name="fedbpt-runs", daemon=True).start()
        except BaseException:
            self._ended.set()
            raise

    def stop(self) -> None:
        """Stop the running run so that it can be resumed, and the thread."""
        with self._lock:
            self._stopping = True
            if self._current is not None:
                self._current.control.stop()
        self._woken.set()
        self._ended.wait()

    def is_alive(self) -> bool:
        """Whether the thread works; if not, see `failure`."""
        return not self._ended.is_set()

    def join(self, timeout_s: float) -> None:
        """Wait until the thread's work has ended, for at most ``timeout_s`` seconds."""
        self._ended.wait(timeout_s)

    # --- for the operator ----------------------------------------------------------------------------------------

    def hand_in(self, submission: Submission) -> Job:
        """Queue a run, or resume one that was cancelled or failed; a finished one with the same budget stays.

        Raises:
            CoordinatorRefusedError: see `RunQueue.add`; ``conflict``: also a stored run of another task or settings, or
                settings that do not fit the task.
        """
        run = submission.run
        has_result = self._is_finished(submission)
        if not (has_result and any(job.run == run and job.state == "finished" for job in self.queue.jobs())):
            self.queue.add(submission)
            self._woken.set()
        return self.job(run)

    def cancel(self, run: str) -> Job:
        """Stop a run, or take it out of the queue; its closed rounds are kept. Raises as `job` does."""
        with self._lock:
            if not self.queue.cancel_queued(run) and self._current is not None and self._current.run == run:
                self._cancelled = run
                self._current.control.stop()
        return self.job(run)

    def job(self, run: str) -> Job:
        """See `RunQueue.job`."""
        return self._described(self.queue.job(run))

    def jobs(self) -> list[Job]:
        """See `RunQueue.jobs`."""
        return [self._described(job) for job in self.queue.jobs()]

    def feed(self, run: str) -> EventFeed:
        """The events of the running ``run``. Raises `CoordinatorRefusedError` (``conflict``) if it does not run."""
        current = self._current
        if current is None or current.run != run:
            raise CoordinatorRefusedError(f"run {run!r} does not run now: ask for its state", "conflict")
        return current.feed

    def result(self, run: str) -> bytes:
        """The `RunResult` of a finished run, encoded. Raises `CoordinatorRefusedError`."""
        job = self.queue.job(run)
        found = self.store.find_run(run)
        if job.state != "finished" or found is None or found.result is None:
            raise CoordinatorRefusedError(
                f"run {run!r} is {job.state}, and only a finished run has a result: wait for its end", "conflict"
            )
        return found.result

    def _described(self, job: Job) -> Job:
        current = self._current
        if job.state == "running" and current is not None and current.run == job.run:
            return msgspec.structs.replace(job, detail=self._waits_for)
        return job

    def _is_finished(self, submission: Submission) -> bool:
        """Whether the store has the result of a run that is not to start over.

        Raises:
            CoordinatorRefusedError: its settings do not fit its task, or the store has another run of this name.
        """
        try:
            if submission.fresh:
                submission.settings.for_labels(submission.task.labels, submission.task.generation).aggregator()
                return False
            return has_result(self.store, submission.run, submission.task, submission.settings)
        except FedbptError as error:
            raise CoordinatorRefusedError(str(error), "conflict") from error

    # --- the thread ----------------------------------------------------------------------------------------------

    def _work(self, server: CoordinatorServer) -> None:
        try:
            while True:
                self._woken.clear()
                current = self._take()
                if current is not None:
                    self._finish(server, *current)
                    collect_normally()
                elif self._stopping:
                    return
                else:
                    self._woken.wait()
        except BaseException as error:  # noqa: BLE001 - raised by the thread that waits for this one
            self.failure = error
        finally:
            self._ended.set()

    def _take(self) -> tuple[Submission, Current] | None:
        with self._lock:
            if self._stopping:
                return None
            submission = self.queue.take()
            if submission is None:
                return None
            self._current = Current(submission.run, RunControl(), EventFeed())
            return submission, self._current

    def _finish(self, server: CoordinatorServer, submission: Submission, current: Current) -> None:
        """Run to the end, and record how it ended."""
        run = submission.run
        self._tell(f"run {run}: begins")
        ended = ""
        try:
            result = self._run(server, submission, current)
            self.queue.end(run, "finished")
            ended = f"finished after {result.rounds} rounds"
        except RunStopped:
            if self._over_quota:
                self.queue.end(run, "failed", self._over_quota)
                ended = f"failed: {self._over_quota}"
            elif self._stopping and self._cancelled != run:
                ended = "stopped with the coordinator, which resumes it when it is started again"
            else:
                self.queue.end(run, "cancelled")
                ended = "cancelled"
        except Exception as error:
            reason = public_reason(error)
            if not isinstance(error, FedbptError):
                log.exception("run %s failed", run)
                reason = f"{type(error).__name__}, a bug in fedbpt: see the coordinator's log"
            self.queue.end(run, "failed", reason)
            ended = f"failed: {reason}"
        finally:
            with self._lock:
                self._current = None
                self._waits_for = self._cancelled = self._over_quota = ""
            current.feed.end()
        self._tell(f"run {run}: {ended}")

    def _run(self, server: CoordinatorServer, submission: Submission, current: Current) -> RunResult:
        run = submission.run
        with ExitStack() as stack:
            log_file = stack.enter_context(LogFile(self._logs / f"{run}.jsonl"))
            watch = stack.enter_context(self._watch(run, current.control))
            journal = Journal(log_file, current.feed, watch)
            stack.enter_context(journal.hearing_warnings())
            stack.enter_context(self.store.held(run))
            is_fresh = submission.fresh
            stored_bytes = 0  # of earlier sessions

            def hear(event: Event) -> None:
                nonlocal is_fresh, stored_bytes
                journal(event)
                match event:
                    case RunStarted():
                        stored_bytes = sum(each.bytes_up + each.bytes_down for each in self.store.traffic(run).values())
                        self._check_bytes(stored_bytes, current.control)
                    case RoundClosed() | Evaluated():
                        used = sum(client.bytes_up + client.bytes_down for client in clients)
                        self._check_bytes(stored_bytes + used, current.control)
                if is_fresh and isinstance(event, RoundClosed):
                    is_fresh = False
                    self.queue.begun(run)
                collect_between_rounds(event)

            names = self._draft(server, submission, current.control)
            clients = [server.client(name) for name in names]
            settings = submission.settings
            federation = Federation(
                clients,
                submission.task,
                settings,
                settings.aggregator(),
                self.store,
                run,
                hear,
                current.control,
                submission.fresh,
            )
            return federation.run()

    def _check_bytes(self, used: int, control: RunControl) -> None:
        """Stop the run if its devices have sent and received more bytes than its quota."""
        most = self.queue.quota.bytes
        if most is not None and used > most:
            self._over_quota = (
                f"its devices sent and received {used:,} bytes, and this coordinator allows a run {most:,}: its rounds"
                " are kept, so ask for a higher limit (--max-bytes) to resume it"
            )
            control.stop()

    def _draft(self, server: CoordinatorServer, submission: Submission, control: RunControl) -> list[str]:
        stored = None if submission.fresh else self.store.find_run(submission.run)
        if stored is not None and stored.status == "finished" and self._is_finished(submission):
            return sorted(self.store.devices(submission.run))  # they are not called
        enrolled = {line.device for line in self._registry.devices() if line.state == "enrolled"}
        known = [] if stored is None else sorted(enrolled & {*self.store.devices(submission.run)})
        model = submission.model_fingerprint or ("" if stored is None else stored.model_fingerprint)

        def tell(what: str) -> None:
            line = one_line(what, MAX_MESSAGE_CHARS)
            if line != self._waits_for:
                self._tell(f"run {submission.run}: {line}")
            self._waits_for = line

        try:
            return draft(submission, server, self._registry, known, model, self._wait_s, control, tell)
        finally:
            self._waits_for = ""
