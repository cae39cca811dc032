"""`DeviceClient`: what the round loop asks of a transport."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from fedbpt.coordinator.slots import Slots
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

ProgressCallback: TypeAlias = Callable[[RoundProgress], None]
AnswerCallback: TypeAlias = Callable[[Answer], None]


class DeviceClient(Protocol):
    """One device, as the coordinator sees it. Every call may be repeated safely, and ends in bounded time.

    Every method may raise:

        DeviceUnreachableError: no answer, tried again for a few seconds.
        DeviceRefusedError: the device said no; ``code`` is one of ``conflict`` (another plan for this round),
            ``busy``, ``wrong-model``, ``wrong-task``, ``unknown-round`` (the device was restarted), ``malformed``, ...
        WireError: the answer is not what the protocol allows.

    ``bytes_down`` and ``bytes_up`` count the bodies of messages to and from the device as they are sent, with every
    repetition and poll; not headers, TLS or TCP.
    """

    @property
    def name(self) -> str:
        """The coordinator's name for the device; constant."""
        ...

    @property
    def bytes_up(self) -> int: ...

    @property
    def bytes_down(self) -> int: ...

    async def status(self) -> DeviceInfo: ...

    async def start(self, plan: RoundPlan, history: SearchHistory | None = None) -> None:
        """Hand over ``plan``; returns when the device has accepted it.

        ``history``: of the search whose generation ``plan`` asks for, up to that; a transport may send of it what the
        device has not heard, instead of the state.
        """
        ...

    async def wait(
        self, run: str, round: int, timeout_s: float | None = None, on_progress: ProgressCallback | None = None
    ) -> RoundReport:
        """The report of a round that was started.

        Raises also DeviceTimeoutError: not done after ``timeout_s`` (None: as long as it takes);
        DeviceFailedError: the work failed or was cancelled.
        """
        ...

    async def work(
        self,
        plan: RoundPlan,
        history: SearchHistory | None = None,
        on_progress: ProgressCallback | None = None,
        slots: Slots | None = None,
    ) -> RoundReport:
        """The report on ``plan``: `start` and `wait`, in as few exchanges as it takes.

        ``slots``: one is held while the plan is handed over.
        """
        ...

    async def cancel(self, run: str, round: int) -> None:
        """Stop a round, or let go of its report. Not there: no error."""
        ...

    async def evaluate(self, request: EvaluateRequest, timeout_s: float | None = None) -> EvaluateReport:
        """Start, or find again, and await an evaluation; raises as `wait` does, and cancels it on a time-out."""
        ...

    async def ask(
        self, question: Question, timeout_s: float | None = None, on_answer: AnswerCallback | None = None
    ) -> Answer:
        """Have a question answered; ``on_answer`` is called with what there is so far. Raises as `evaluate` does."""
        ...

    async def aclose(self) -> None:
        """Let go of connections and threads. The client may be used again, also from another event loop."""
        ...


class Works:
    """`DeviceClient.work`, by `DeviceClient.start` and `DeviceClient.wait`."""

    async def work(
        self: DeviceClient,
        plan: RoundPlan,
        history: SearchHistory | None = None,
        on_progress: ProgressCallback | None = None,
        slots: Slots | None = None,
    ) -> RoundReport:
        """See `DeviceClient.work`."""
        async with (slots or Slots()).acquire():
            await self.start(plan, history)
        return await self.wait(plan.run, plan.round, None, on_progress)
