"""`InProcessClient`: a device in this process, for simulation, tuning on one machine, and tests.

Behind the same service as over HTTP, and through the same bytes: what cannot cross a wire cannot cross here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fedbpt.coordinator.clients.base import AnswerCallback, ProgressCallback, Works
from fedbpt.coordinator.report_checks import check_progress
from fedbpt.device.agent.service import AgentService, LocalDevice
from fedbpt.device.agent.worker import Worker
from fedbpt.errors import DeviceFailedError, DeviceRefusedError, DeviceTimeoutError, DeviceUnreachableError
from fedbpt.protocol import codec
from fedbpt.protocol.questions import Answer, Question
from fedbpt.protocol.rounds import (
    DeviceInfo,
    EvaluateReport,
    EvaluateRequest,
    RoundPlan,
    RoundProgress,
    RoundReport,
    SearchHistory,
)
from fedbpt.protocol.specs import Message

M = TypeVar("M", bound=Message)
A = TypeVar("A")

POLL_S = 0.5
"""Between two looks at the progress, which cross no wire and count no bytes (over HTTP 0.1 KB every 5 s)."""


class InProcessClient(Works):
    """Reaches ``device`` through an `AgentService`. See `DeviceClient` for the methods.

    ``worker``: share one between devices that share a scorer; None: a thread of its own.
    """

    def __init__(self, device: LocalDevice, name: str | None = None, worker: Worker | None = None) -> None:
        self.name = name or device.name
        self.bytes_up = 0
        self.bytes_down = 0
        self._device = device
        self._worker = worker
        self._service: AgentService | None = None

    def __repr__(self) -> str:
        return f"InProcessClient({self.name!r})"

    @property
    def service(self) -> AgentService:
        if self._service is None:
            self._service = AgentService(self._device, self._worker)
        return self._service

    async def status(self) -> DeviceInfo:
        return self._up(self.service.status(), DeviceInfo)

    async def start(self, plan: RoundPlan, history: SearchHistory | None = None) -> None:  # noqa: ARG002 - no wire
        self._up(self.service.start(self._down(plan)), RoundProgress)

    async def wait(
        self, run: str, round: int, timeout_s: float | None = None, on_progress: ProgressCallback | None = None
    ) -> RoundReport:
        deadline = _deadline(timeout_s)
        while True:
            answer = await self._reached(self.service.wait(run, round, _step(deadline)))
            if isinstance(answer, RoundReport):
                return self._up(answer, RoundReport)
            answer = codec.decode(codec.encode(answer), RoundProgress)  # counts no bytes, see POLL_S
            check_progress(answer)
            if on_progress is not None and answer.state == "running":
                on_progress(answer)
            self._pending(answer, deadline, f"round {round}", timeout_s)

    async def cancel(self, run: str, round: int) -> None:
        self.service.cancel(run, round)

    async def evaluate(self, request: EvaluateRequest, timeout_s: float | None = None) -> EvaluateReport:
        deadline = _deadline(timeout_s)
        identity = self.service.start_evaluation(self._down(request))
        try:
            while True:
                answer = await self._reached(self.service.wait_evaluation(identity, _step(deadline)))
                if isinstance(answer, EvaluateReport):
                    return self._up(answer, EvaluateReport)
                self._pending(answer, deadline, "an evaluation", timeout_s)
        finally:
            # The result is here, or nobody wants it any more.
            self.service.cancel_evaluation(identity)

    async def ask(
        self, question: Question, timeout_s: float | None = None, on_answer: AnswerCallback | None = None
    ) -> Answer:
        deadline, answer = _deadline(timeout_s), Answer()
        identity = self.service.start_question(self._down(question))
        try:
            while asyncio.get_running_loop().time() < deadline:
                waited = self.service.wait_question(identity, _step(deadline), answer.n)
                answer = self._up(await self._reached(waited), Answer)
                if answer.done:
                    return answer
                if on_answer is not None:
                    on_answer(answer)
            raise DeviceTimeoutError(f"did not finish an answer within {timeout_s:g} s", device=self.name)
        finally:
            self.service.cancel_question(identity)

    async def aclose(self) -> None:
        if self._service is not None:
            service, self._service = self._service, None
            service.stop()
            await asyncio.to_thread(service.close)

    async def _reached(self, answer: Awaitable[A]) -> A:
        try:
            return await answer
        except DeviceRefusedError as error:
            if error.code != "stopping":
                raise
            raise DeviceUnreachableError("is being stopped", device=self.name) from error

    def _pending(self, progress: RoundProgress, deadline: float, what: str, timeout_s: float | None) -> None:
        if progress.state == "cancelled":
            raise DeviceFailedError(f"{what} was cancelled", device=self.name)
        if asyncio.get_running_loop().time() >= deadline:
            raise DeviceTimeoutError(f"did not finish {what} within {timeout_s:g} s", device=self.name)

    def _down(self, message: M) -> M:
        body = codec.encode(message)
        self.bytes_down += len(body)
        return codec.decode(body, type(message))

    def _up(self, message: Message, kind: type[M]) -> M:
        body = codec.encode(message)
        self.bytes_up += len(body)
        return codec.decode(body, kind)


def _deadline(timeout_s: float | None) -> float:
    return float("inf") if timeout_s is None else asyncio.get_running_loop().time() + timeout_s


def _step(deadline: float) -> float:
    return min(POLL_S, max(deadline - asyncio.get_running_loop().time(), 0.0))
