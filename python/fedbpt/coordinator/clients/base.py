"""`DeviceClient`: one device, as the round loop uses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from fedbpt.coordinator.devices.slots import Slots
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
    """One device. Every call may be repeated without further effect, and ends in bounded time.

    Every method may raise:

        DeviceUnreachableError: no response, after retries.
        DeviceRefusedError: the device refused the request; ``code`` is one of ``conflict`` (another plan for this
            round), ``not-drawn``, ``busy``, ``wrong-model``, ``wrong-task``, ``unknown-round`` (the device was
            restarted), ``malformed``, ...
        WireError: the response is not what the protocol allows.

    ``bytes_down`` and ``bytes_up`` count the bodies of messages to and from the device, including retries and polls;
    not headers, TLS or TCP.
    """

    @property
    def name(self) -> str:
        """The coordinator's name for the device; does not change."""
        ...

    @property
    def bytes_up(self) -> int: ...

    @property
    def bytes_down(self) -> int: ...

    @property
    def due_s(self) -> float:
        """Seconds until the device is to call in; 0: it can be reached now, as far as is known."""
        ...

    async def status(self) -> DeviceInfo: ...

    async def start(self, plan: RoundPlan, history: SearchHistory | None = None, share: float | None = None) -> None:
        """Send ``plan``; returns when the device has accepted it.

        ``history``: of the search, up to the generation that ``plan`` asks for; the part that the device lacks may be
        sent instead of the state.
        ``share``: of all devices, the part that this one is drawn from (`fedbpt.protocol.draws`), which it checks;
        None: the round is not drawn so.
        """
        ...

    async def wait(
        self, run: str, round: int, timeout_s: float | None = None, on_progress: ProgressCallback | None = None
    ) -> RoundReport:
        """The report of a round that was started.

        Also raises:
            DeviceTimeoutError: not done after ``timeout_s`` seconds (None: no limit).
            DeviceFailedError: the work failed or was cancelled.
        """
        ...

    async def work(
        self,
        plan: RoundPlan,
        history: SearchHistory | None = None,
        on_progress: ProgressCallback | None = None,
        slots: Slots | None = None,
        share: float | None = None,
    ) -> RoundReport:
        """The report on ``plan``: `start` and `wait`, in as few exchanges as possible.

        ``slots``: one is held while the plan is sent. ``share``: see `start`.
        """
        ...

    async def cancel(self, run: str, round: int) -> None:
        """Stop a round, or discard its report. An unknown round is no error."""
        ...

    async def evaluate(self, request: EvaluateRequest, timeout_s: float | None = None) -> EvaluateReport:
        """Start an evaluation (or join the same one) and await it; raises as `wait`, and cancels it on a time-out."""
        ...

    async def ask(
        self, question: Question, timeout_s: float | None = None, on_answer: AnswerCallback | None = None
    ) -> Answer:
        """Answer a question; ``on_answer`` is called with the answer so far. Raises as `evaluate`."""
        ...

    async def aclose(self) -> None:
        """Close connections and threads. The client may be used again, also from another event loop."""
        ...


class Works:
    """`DeviceClient.work`, by `DeviceClient.start` and `DeviceClient.wait`."""

    async def work(
        self: DeviceClient,
        plan: RoundPlan,
        history: SearchHistory | None = None,
        on_progress: ProgressCallback | None = None,
        slots: Slots | None = None,
        share: float | None = None,
    ) -> RoundReport:
        """See `DeviceClient.work`."""
        async with (slots or Slots()).acquire():
            await self.start(plan, history, share)
        return await self.wait(plan.run, plan.round, None, on_progress)
