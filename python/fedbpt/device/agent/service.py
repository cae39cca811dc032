"""`AgentService`: handles a coordinator's requests to a device, independently of HTTP.

Work is accepted at once and polled for. It runs on the worker's thread, one job at a time; everything else runs on the
caller's event loop, so there are no locks. The rules that make every request idempotent:

- the same plan is accepted again: running and finished work is kept, failed work is restarted;
- a different plan for the same round is refused as ``conflict``;
- a plan for another round of the same run replaces the previous ones: the coordinator only requests round r + 1 after
  it has committed round r, so this acknowledges the report without a request of its own;
- otherwise a finished report is kept until it is cancelled, however often it is fetched;
- while a round of another run is running, a plan is refused as ``busy``.
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

from fedbpt.device.agent.drawn import DrawCheck
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

MAX_FINISHED_JOBS: Final = 16
"""Finished jobs (of other runs, and evaluations) that are kept; then the oldest is dropped."""

EVALUATION: Final = "evaluate"
"""The run in the progress of an evaluation or a question. A run may have this name too."""

INTERRUPT_S: Final = 0.1
"""Interval at which cancelled work is interrupted again until it has ended, seconds."""

PAUSE_POLL_S: Final = 0.5
"""Poll interval of paused work, seconds."""


class LocalDevice(Protocol):
    """A device's work, as `fedbpt.device.device.Device`. One thread at a time calls it, except `interrupt`."""

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
        """Stop the current scoring call, if any. Called from another thread."""


Output: TypeAlias = RoundReport | EvaluateReport | Answer
State: TypeAlias = Literal["running", "done", "failed", "cancelled"]


class _Job:
    """Accepted work. All fields but ``cancelled``, ``steps`` and ``paused`` are only used on the event loop."""

    def __init__(self, run: str, round: int, digest: str, is_round: bool = True) -> None:
        self.run = run
        self.round = round
        self.digest = digest
        self.is_round = is_round
        self.state: State = "running"
        self.steps = (0, 0)
        self.cancelled = False
        self.paused = ""
        self.error = ""
        self.is_fault = False
        self.output: Output | None = None
        self.ended = asyncio.Event()
        self.answer = Answer()  # to a question, as far as it has come
        self.news = asyncio.Event()  # set when the answer has grown

    def say(self, answer: Answer) -> None:
        self.answer = answer
        self.news.set()

    def step(self, done: int, total: int) -> None:
        self.steps = (done, total)

    def end(self, state: State, output: Output | None = None, error: str = "") -> None:
        self.state = state
        self.output = output
        self.error = error
        self.ended.set()
        self.news.set()

    def progress(self) -> RoundProgress:
        done, total = self.steps
        return RoundProgress(
            run=self.run,
            round=self.round,
            state=self.state,
            done=done,
            total=total,
            error=self.error,
            paused=self.paused if self.state == "running" else "",
        )


class AgentService:
    """Serves one `LocalDevice`. All methods are to be called on one event loop.

    Args:
        device: does the work.
        worker: runs it; None: a new `Worker`.
        pause: called on the worker's thread between scoring calls; work is paused while it returns a reason.
            Deadlines continue.

    Raises `DeviceRefusedError` with a stable ``code`` for refused requests.
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
        self._draws = DrawCheck()
        self._working: _Job | None = None  # the job on the worker's thread
        self._switching = threading.Lock()
        self._stopping = asyncio.Event()
        self._info = device.info()

    # --- requests ------------------------------------------------------------------------------------------------

    def status(self) -> DeviceInfo:
        """The device's description as of its last completed work, with current temperature and battery."""
        # Does not call the device, which could block for as long as a scoring call.
        paused = next((job.paused for job in self._jobs.values() if job.state == "running" and job.paused), "")
        celsius, battery = heat().celsius, battery_percent()
        return msgspec.structs.replace(self._info, busy=self.busy, paused=paused, celsius=celsius, battery=battery)

    @property
    def busy(self) -> bool:
        return any(job.state == "running" for job in self._jobs.values())

    def start(self, plan: RoundPlan, share: float | None = None) -> RoundProgress:
        """Accept ``plan``. Refused as ``conflict``, ``busy``, ``wrong-model``, ``wrong-task`` or ``not-drawn``.

        ``share``: of all devices, the part that the plan's round says it draws, this device among them; None: all.
        """
        self._check_open()
        self._check_fits(plan.model_fingerprint, plan.task)
        if share is not None and (problem := self._draws.problem(plan, share)):
            raise self._refusal("not-drawn", problem)
        digest = codec.digest(plan)
        known = self._jobs.get((plan.run, plan.round))
        if known and known.digest != digest:
            raise self._refusal(
                "conflict",
                f"round {plan.round} of run {plan.run!r} was started with a different plan: use another run name",
            )
        if known and known.state in ("running", "done"):
            return known.progress()
        rounds = [job for job in self._jobs.values() if job.is_round]
        for job in rounds:
            if job.state == "running" and job.run != plan.run:
                raise self._refusal("busy", f"the device is working on round {job.round} of run {job.run!r}: try later")
        for job in rounds:
            if job.run == plan.run:
                self._drop(job)

        job = _Job(plan.run, plan.round, digest)
        self._submit((plan.run, plan.round), job, lambda: self.device.run(plan, job.step, self._stops(job)))
        return job.progress()

    async def wait(self, run: str, round: int, seconds: float) -> RoundReport | RoundProgress:
        """The report, or the progress after ``seconds``. Raises `DeviceFailedError` if the work failed.

        Refused as ``unknown-round`` if the device was restarted or has dropped the round.
        """
        job = self._jobs.get((run, round))
        if job is None:
            raise self._refusal("unknown-round", f"no round {round} of run {run!r} here: send its plan again")
        output = await self._await(job, seconds)
        return output if isinstance(output, RoundReport) else job.progress()

    def cancel(self, run: str, round: int) -> None:
        """Stop a round, or drop its report. An unknown round is ignored."""
        job = self._jobs.get((run, round))
        if job is not None:
            self._drop(job)

    def start_evaluation(self, request: EvaluateRequest) -> str:
        """Accept ``request``; returns the id of the result. Equal requests have the same id."""
        self._check_open()
        self._check_fits(request.model_fingerprint, request.task)
        identity = codec.digest(request)
        known = self._evaluation(identity)
        if known is None or known.state not in ("running", "done"):
            job = _Job(EVALUATION, 0, identity, is_round=False)
            self._submit((identity, -1), job, lambda: self.device.evaluate(request, job.step, self._stops(job)))
        return identity

    async def wait_evaluation(self, identity: str, seconds: float) -> EvaluateReport | RoundProgress:
        """The result, or the progress after ``seconds``; see `wait`. Refused as ``unknown-evaluation``."""
        job = self._evaluation(identity)
        if job is None:
            raise self._refusal("unknown-evaluation", "no such evaluation here: send its request again")
        output = await self._await(job, seconds)
        return output if isinstance(output, EvaluateReport) else job.progress()

    def cancel_evaluation(self, identity: str) -> None:
        """Stop an evaluation, or drop its result. An unknown one is ignored."""
        job = self._evaluation(identity)
        if job is not None:
            self._drop(job)

    def start_question(self, question: Question) -> str:
        """Accept ``question``; returns the id of its answer. Equal questions have the same id."""
        self._check_open()
        self._check_fits(question.model_fingerprint, None)
        identity = codec.digest(question)
        known = self._evaluation(identity)
        if known is None or known.state not in ("running", "done"):
            job = _Job(EVALUATION, 0, identity, is_round=False)
            loop = asyncio.get_running_loop()

            def said(answer: Answer) -> None:
                loop.call_soon_threadsafe(job.say, answer)

            self._submit((identity, -1), job, lambda: self.device.answer(question, said, self._stops(job)))
        return identity

    async def wait_question(self, identity: str, seconds: float, seen: int = 0) -> Answer:
        """The answer so far, as soon as it is complete or has more than ``seen`` pieces, or after ``seconds``.

        Refused as ``unknown-question``. Raises `DeviceFailedError` if the work failed or was cancelled.
        """
        job = self._evaluation(identity)
        if job is None:
            raise self._refusal("unknown-question", "no such question here: ask it again")
        if job.state == "running" and job.answer.n <= seen:
            job.news.clear()
            await self._await(job, seconds, job.news)
        output = await self._await(job, 0.0)
        if job.state == "cancelled":
            raise DeviceFailedError("the question was cancelled")
        return output if isinstance(output, Answer) else job.answer

    def cancel_question(self, identity: str) -> None:
        """Stop answering, or drop the answer."""
        self.cancel_evaluation(identity)

    def stop(self) -> None:
        """Cancel all work and end all waits; every later request is refused as ``stopping``."""
        self._stopping.set()
        for job in list(self._jobs.values()):
            self._drop(job)

    def close(self, timeout_s: float = 5.0) -> bool:
        """Stop and wait for the worker; returns whether it ended in time."""
        self.stop()
        return self._worker.close(timeout_s) if self._owns_worker else True

    # --- inside --------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._stopping.is_set():
            raise self._refusal("stopping", "the device is shutting down: try later")

    def _check_fits(self, model_fingerprint: str, task: TaskIdentity | None) -> None:
        if (found := misfit(self._info, model_fingerprint, task)) is not None:
            raise self._refusal(found.code, f"this device {found.reason}")

    def _refusal(self, code: str, message: str) -> DeviceRefusedError:
        self.counts["refused"] += 1
        return DeviceRefusedError(message, code)

    def _evaluation(self, identity: str) -> _Job | None:
        return self._jobs.get((identity, -1))  # no plan has a negative round, so the keys do not collide

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
        for old in ended[: max(len(ended) - MAX_FINISHED_JOBS, 0)]:
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
        """Interrupt the scoring call of ``job``, repeatedly, as it may be about to make the next one."""
        with self._switching:
            if self._working is not job:
                return
            self.device.interrupt()
        with suppress(RuntimeError):  # there is no loop any more: the service has ended
            asyncio.get_running_loop().call_later(INTERRUPT_S, self._interrupt, job)

    def _stops(self, job: _Job) -> Callable[[], bool]:
        """The callback that tells ``job`` between scoring calls whether it was cancelled; it blocks during a pause."""

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
            log.exception("cannot update the device's description")
            info = self._info
        try:
            loop.call_soon_threadsafe(self._finish, job, output, error, is_fault, info)
        except RuntimeError:
            log.info("work of round %s of run %r ended after the server had stopped", job.round, job.run)

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
    """The service's counters and memory in Prometheus text format."""
    info = service.status()
    states = [Sample(count, {"state": state}) for state, count in sorted(service.counts.items())]
    return exposition(
        [
            Family("work_total", "counter", "Work items by outcome.", states),
            Family("busy", "gauge", "Whether work is running.", [Sample(int(info.busy))]),
            Family("rss_bytes", "gauge", "Resident memory.", [Sample(info.rss_bytes)]),
            Family("peak_rss_bytes", "gauge", "Peak resident memory.", [Sample(info.peak_rss_bytes)]),
        ]
    )
