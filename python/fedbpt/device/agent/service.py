"""`AgentService`: what a device answers to a coordinator's requests. Knows no HTTP.

Work is accepted at once and polled. It runs on the worker's thread, one job at a time; everything else runs on the
caller's event loop, so there are no locks. The rules, which make every request safe to repeat:

- the same plan again is accepted again: running and finished work stays as it is, failed work starts anew;
- a different plan for the same round is a ``conflict``;
- a plan of the same run for another round supersedes what came before: the coordinator asks for round r + 1 only
  when it has committed round r, so this is the acknowledgement, and no request is spent on it;
- a finished report is otherwise kept until it is cancelled, however often it is fetched;
- while another run's round is at work, a plan is refused as ``busy``.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Literal, Protocol, TypeAlias

import msgspec

from fedbpt.device.agent.worker import Worker
from fedbpt.errors import DeviceFailedError, DeviceRefusedError, FedbptError, ScoringInterrupted
from fedbpt.faults import public_reason
from fedbpt.machine.info import battery_percent, heat
from fedbpt.net.prometheus import Family, Sample, exposition
from fedbpt.protocol import codec
from fedbpt.protocol.membership import misfit
from fedbpt.protocol.questions import Answer, Question
from fedbpt.protocol.rounds import DeviceInfo, EvaluateReport, EvaluateRequest, RoundPlan, RoundProgress, RoundReport
from fedbpt.protocol.task_identity import TaskIdentity

log = logging.getLogger(__name__)

KEPT_JOBS: Final = 16
"""Finished pieces of work (of other runs, and evaluations) that are kept before the oldest is dropped."""

EVALUATION: Final = "evaluate"
"""The run that the progress of an evaluation or a question names. A run may have that name, too."""

INTERRUPT_S: Final = 0.1
"""How often work that was cancelled is stopped again, until it has ended."""

PAUSE_POLL_S: Final = 0.5
"""How often paused work looks whether it may go on."""


class LocalDevice(Protocol):
    """The device's own work (`fedbpt.device.device.Device`). Synchronous; but for `interrupt`, one thread calls at a
    time.
    """

    @property
    def name(self) -> str: ...

    def info(self) -> DeviceInfo: ...

    def run(
        self, plan: RoundPlan, progress: Callable[[int, int], None], cancelled: Callable[[], bool]
    ) -> RoundReport: ...

    def evaluate(
        self, request: EvaluateRequest, progress: Callable[[int, int], None], cancelled: Callable[[], bool]
    ) -> EvaluateReport: ...

    def answer(self, question: Question, said: Callable[[Answer], None], cancelled: Callable[[], bool]) -> Answer: ...

    def interrupt(self) -> None:
        """Stop the scoring call that is under way. Called from another thread; there may be none."""


Output: TypeAlias = RoundReport | EvaluateReport | Answer
State: TypeAlias = Literal["running", "done", "failed", "cancelled"]


class _Job:
    """One accepted piece of work. All fields but ``cancelled``, ``steps`` and ``paused`` belong to the event loop."""

    def __init__(self, run: str, round: int, digest: str, is_round: bool = True) -> None:
        self.run, self.round, self.digest, self.is_round = run, round, digest, is_round
        self.state: State = "running"
        self.steps = (0, 0)
        self.cancelled = False
        self.paused = ""
        self.error = ""
        self.is_fault = False
        self.output: Output | None = None
        self.ended = asyncio.Event()
        self.answer = Answer()  # to a question, so far
        self.news = asyncio.Event()  # of it

    def say(self, answer: Answer) -> None:
        self.answer = answer
        self.news.set()

    def step(self, done: int, total: int) -> None:
        self.steps = (done, total)

    def end(self, state: State, output: Output | None = None, error: str = "") -> None:
        self.state, self.output, self.error = state, output, error
        self.ended.set()
        self.news.set()

    def progress(self) -> RoundProgress:
        done, total = self.steps
        return RoundProgress(
            run=self.run, round=self.round, state=self.state, done=done, total=total, error=self.error,
            paused=self.paused if self.state == "running" else "",
        )  # fmt: skip


class AgentService:
    """Serves one `LocalDevice`.

    Args:
        device: whose work it is.
        worker: where that runs; None: a thread of its own.
        pause: asked on that thread between scoring calls; work waits while it names a reason. Deadlines go on.

    All methods are for one event loop. Refusals are `DeviceRefusedError` with a stable ``code``.
    """

    def __init__(
        self, device: LocalDevice, worker: Worker | None = None, pause: Callable[[], str] = lambda: ""
    ) -> None:
        self.device = device
        self.counts = {"accepted": 0, "done": 0, "failed": 0, "cancelled": 0, "refused": 0}
        self._worker = worker or Worker(f"fedbpt-{device.name}")
        self._owns_worker = worker is None
        self._pause = pause
        self._jobs: dict[tuple[str, int], _Job] = {}
        self._working: _Job | None = None  # on the worker's thread
        self._switching = threading.Lock()
        self._stopping = asyncio.Event()
        self._info = device.info()

    # --- requests ------------------------------------------------------------------------------------------------

    def status(self) -> DeviceInfo:
        """What the device said of itself before its current work, or after its last; its heat and battery of now."""
        # Never asks the device here: while it scores, that could block for as long as a scoring call.
        paused = next((job.paused for job in self._jobs.values() if job.state == "running" and job.paused), "")
        celsius, battery = heat().celsius, battery_percent()
        return msgspec.structs.replace(self._info, busy=self.busy, paused=paused, celsius=celsius, battery=battery)

    @property
    def busy(self) -> bool:
        return any(job.state == "running" for job in self._jobs.values())

    def start(self, plan: RoundPlan) -> RoundProgress:
        """Accept ``plan``; refused as ``conflict``, ``busy``, ``wrong-model`` or ``wrong-task``."""
        self._check_open()
        self._check_fits(plan.model_fingerprint, plan.task)
        digest = codec.digest(plan)
        known = self._jobs.get((plan.run, plan.round))
        if known and known.digest != digest:
            raise self._refusal("conflict", f"round {plan.round} of run {plan.run!r} was begun with another plan")
        if known and known.state in ("running", "done"):
            return known.progress()
        rounds = [job for job in self._jobs.values() if job.is_round]
        for job in rounds:
            if job.state == "running" and job.run != plan.run:
                raise self._refusal("busy", f"device is working on round {job.round} of run {job.run!r}: try later")
        for job in rounds:
            if job.run == plan.run:
                self._drop(job)

        job = _Job(plan.run, plan.round, digest)
        self._submit((plan.run, plan.round), job, lambda: self.device.run(plan, job.step, self._stops(job)))
        return job.progress()

    async def wait(self, run: str, round: int, seconds: float) -> RoundReport | RoundProgress:
        """The report, or after ``seconds`` where the round stands; `DeviceFailedError` where the work failed.

        Refused as ``unknown-round`` where the device has no such round: it was restarted, or let go of it.
        """
        job = self._jobs.get((run, round))
        if job is None:
            raise self._refusal("unknown-round", f"no round {round} of run {run!r} here: send its plan again")
        output = await self._await(job, seconds)
        return output if isinstance(output, RoundReport) else job.progress()

    def cancel(self, run: str, round: int) -> None:
        """Stop a round, or let go of its report. One that is not there is cancelled already."""
        job = self._jobs.get((run, round))
        if job is not None:
            self._drop(job)

    def start_evaluation(self, request: EvaluateRequest) -> str:
        """Accept ``request``; returns the id by which to fetch the result. The same request has the same id."""
        self._check_open()
        self._check_fits(request.model_fingerprint, request.task)
        identity = codec.digest(request)
        known = self._evaluation(identity)
        if known is None or known.state not in ("running", "done"):
            job = _Job(EVALUATION, 0, identity, is_round=False)
            self._submit((identity, -1), job, lambda: self.device.evaluate(request, job.step, self._stops(job)))
        return identity

    async def wait_evaluation(self, identity: str, seconds: float) -> EvaluateReport | RoundProgress:
        """The result, or after ``seconds`` where it stands; otherwise as `wait`."""
        job = self._evaluation(identity)
        if job is None:
            raise self._refusal("unknown-evaluation", "no such evaluation here: send its request again")
        output = await self._await(job, seconds)
        return output if isinstance(output, EvaluateReport) else job.progress()

    def cancel_evaluation(self, identity: str) -> None:
        """Stop an evaluation, or let go of its result."""
        job = self._evaluation(identity)
        if job is not None:
            self._drop(job)

    def start_question(self, question: Question) -> str:
        """Accept ``question``; returns the id by which to fetch the answer. The same question has the same id."""
        self._check_open()
        self._check_fits(question.model_fingerprint, None)
        identity = codec.digest(question)
        known = self._evaluation(identity)
        if known is None or known.state not in ("running", "done"):
            job, loop = _Job(EVALUATION, 0, identity, is_round=False), asyncio.get_running_loop()

            def said(answer: Answer) -> None:
                loop.call_soon_threadsafe(job.say, answer)

            self._submit((identity, -1), job, lambda: self.device.answer(question, said, self._stops(job)))
        return identity

    async def wait_question(self, identity: str, seconds: float, seen: int = 0) -> Answer:
        """The answer, or what there is of it once it has more than ``seen`` pieces, or after ``seconds``.

        Refused as ``unknown-question``; `DeviceFailedError` where there will be no answer.
        """
        job = self._evaluation(identity)
        if job is None:
            raise self._refusal("unknown-question", "no such question here: ask it again")
        if job.state == "running" and job.answer.n <= seen:
            job.news.clear()
            await self._await(job, seconds, job.news)
        output = await self._await(job, 0.0)
        if job.state == "cancelled":
            raise DeviceFailedError("the question was withdrawn")
        return output if isinstance(output, Answer) else job.answer

    def cancel_question(self, identity: str) -> None:
        """Stop answering, or let go of the answer."""
        self.cancel_evaluation(identity)

    def stop(self) -> None:
        """Cancel all work and let go of everyone who waits; from now on everything is refused as ``stopping``."""
        self._stopping.set()
        for job in list(self._jobs.values()):
            self._drop(job)

    def close(self, timeout_s: float = 5.0) -> bool:
        """Stop, and wait for the worker; returns whether it ended in time."""
        self.stop()
        return self._worker.close(timeout_s) if self._owns_worker else True

    # --- inside --------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._stopping.is_set():
            raise self._refusal("stopping", "the device is being stopped")

    def _check_fits(self, model_fingerprint: str, task: TaskIdentity | None) -> None:
        if (found := misfit(self._info, model_fingerprint, task)) is not None:
            raise self._refusal(found.code, f"this device {found.reason}")

    def _refusal(self, code: str, message: str) -> DeviceRefusedError:
        self.counts["refused"] += 1
        return DeviceRefusedError(message, code)

    def _evaluation(self, identity: str) -> _Job | None:
        return self._jobs.get((identity, -1))  # no plan has a negative round: the keys never meet

    async def _await(self, job: _Job, seconds: float, event: asyncio.Event | None = None) -> Output | None:
        waits = [asyncio.ensure_future(until.wait()) for until in (event or job.ended, self._stopping)]
        try:
            await asyncio.wait(waits, timeout=max(seconds, 0.0), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        self._check_open()
        if job.state == "failed":
            raise DeviceFailedError(job.error, is_fault=job.is_fault)
        return job.output

    def _submit(self, key: tuple[str, int], job: _Job, work: Callable[[], Output]) -> None:
        self._jobs.pop(key, None)
        self._jobs[key] = job
        self.counts["accepted"] += 1
        ended = [old for old, kept in self._jobs.items() if kept.state != "running"]
        for old in ended[: max(len(ended) - KEPT_JOBS, 0)]:
            del self._jobs[old]
        loop = asyncio.get_running_loop()
        self._worker.submit(lambda: self._on_worker(loop, job, work))

    def _drop(self, job: _Job) -> None:
        job.cancelled = True
        if job.state == "running":
            self.counts["cancelled"] += 1
            job.end("cancelled", error="cancelled")
        self._jobs = {key: kept for key, kept in self._jobs.items() if kept is not job}
        self._interrupt(job)

    def _interrupt(self, job: _Job) -> None:
        """Stop the scoring call of ``job``, and look again: it may have been about to make one."""
        with self._switching:
            if self._working is not job:
                return
            self.device.interrupt()
        with suppress(RuntimeError):  # no running loop: the service ends
            asyncio.get_running_loop().call_later(INTERRUPT_S, self._interrupt, job)

    def _stops(self, job: _Job) -> Callable[[], bool]:
        """What the work asks before each scoring call: whether it was cancelled, which a pause does not hold up."""

        def cancelled() -> bool:
            while not job.cancelled and (reason := self._pause()):
                job.paused = reason
                time.sleep(PAUSE_POLL_S)
            job.paused = ""
            return job.cancelled

        return cancelled

    def _on_worker(self, loop: asyncio.AbstractEventLoop, job: _Job, work: Callable[[], Output]) -> None:
        with self._switching:
            if job.cancelled:
                return
            self._working = job
        output: Output | None = None
        error, is_fault = "", False
        try:
            output = work()
        except ScoringInterrupted:
            error = "the work was interrupted"
        except FedbptError as problem:
            log.warning("work of round %s of run %r failed: %s", job.round, job.run, problem)
            error = public_reason(problem)
        except Exception as problem:
            log.exception("work of round %s of run %r failed", job.round, job.run)
            error, is_fault = public_reason(problem), True
        with self._switching:
            self._working = None
        try:
            info = self.device.info()
        except Exception:
            log.exception("the device could not say how it is")
            info = self._info
        try:
            loop.call_soon_threadsafe(self._finish, job, output, error, is_fault, info)
        except RuntimeError:
            log.info("work of round %s of run %r ended after its server", job.round, job.run)

    def _finish(self, job: _Job, output: Output | None, error: str, is_fault: bool, info: DeviceInfo) -> None:
        self._info, job.is_fault = info, is_fault
        if job.state != "running":
            return
        if output is not None:
            self.counts["done"] += 1
            job.end("done", output)
        else:
            self.counts["failed"] += 1
            job.end("failed", error=error)


def metrics_text(service: AgentService) -> str:
    """The service's counters and memory in Prometheus' text format."""
    info = service.status()
    states = [Sample(count, {"state": state}) for state, count in sorted(service.counts.items())]
    return exposition(
        [
            Family("work_total", "counter", "Pieces of work by what became of them.", states),
            Family("busy", "gauge", "Whether work is under way.", [Sample(int(info.busy))]),
            Family("rss_bytes", "gauge", "Resident memory.", [Sample(info.rss_bytes)]),
            Family("peak_rss_bytes", "gauge", "Highest resident memory.", [Sample(info.peak_rss_bytes)]),
        ]
    )
