"""`FlowerClient`: reaches a device that is a node of Flower. A round is one message, and one reply.

A SuperNode works on one message after the other and starts a process for each, so nothing is asked while it works:
there is no progress, and work that was begun cannot be stopped. What was cancelled is let go of here.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final, TypeVar

import msgspec
from flwr.app import MessageType

from fedbpt.coordinator.clients.base import AnswerCallback, ProgressCallback, Works
from fedbpt.errors import DeviceFailedError, DeviceRefusedError, DeviceTimeoutError, DeviceUnreachableError
from fedbpt.flower.nodes import ANSWER_S, Nodes
from fedbpt.flower.records import answer_of, packed, size_of
from fedbpt.protocol import codec
from fedbpt.protocol.membership import misfit
from fedbpt.protocol.questions import Answer, Question
from fedbpt.protocol.rounds import DeviceInfo, EvaluateReport, EvaluateRequest, RoundPlan, RoundReport, SearchHistory
from fedbpt.protocol.specs import Message

M = TypeVar("M", bound=Message)

TTL_ROUNDS: Final = 3.0
"""How many deadlines long Flower keeps a plan and its reply: so late may a report come and be recorded."""

LEAST_TTL_S: Final = 3600.0


@dataclass
class _Work:
    digest: str
    task: asyncio.Task[RoundReport]

    @property
    def failed(self) -> bool:
        return self.task.done() and (self.task.cancelled() or self.task.exception() is not None)


class FlowerClient(Works):
    """Reaches the device that calls itself ``name``. See `DeviceClient` for the methods."""

    def __init__(self, name: str, nodes: Nodes, *, answer_s: float = ANSWER_S) -> None:
        self.name = name
        self.bytes_up = 0
        self.bytes_down = 0
        self._nodes = nodes
        self._answer_s = answer_s
        self._info: DeviceInfo | None = None
        self._rounds: dict[tuple[str, int], _Work] = {}

    def __repr__(self) -> str:
        return f"FlowerClient({self.name!r})"

    async def status(self) -> DeviceInfo:
        """What the device said last, while it works; it would not answer before it has ended."""
        if (news := self._nodes.news_of(self.name)) is not None:
            self.bytes_up += len(codec.encode(news))
            self._info = news
        elif self._info is not None and self._working():
            return msgspec.structs.replace(self._info, busy=True)
        else:
            try:
                asked = self._ask(MessageType.QUERY, None, DeviceInfo, self._answer_s)
                self._info = await asyncio.wait_for(asked, self._answer_s)
            except asyncio.TimeoutError as error:
                raise DeviceUnreachableError("does not answer: is its SuperNode running?", device=self.name) from error
            except DeviceUnreachableError:
                await self._nodes.look()  # it may be back under another id
                raise
        return self._info

    async def start(self, plan: RoundPlan, history: SearchHistory | None = None) -> None:  # noqa: ARG002 - sent whole
        await self._check_fits(plan)
        key, digest = (plan.run, plan.round), codec.digest(plan)
        known = self._rounds.get(key)
        if known is not None and known.digest != digest:
            raise DeviceRefusedError(f"round {plan.round} was begun with another plan", "conflict", device=self.name)
        if known is not None and not known.failed:
            return
        for run, round in self._working():
            if run != plan.run:
                raise DeviceRefusedError(
                    f"is working on round {round} of run {run!r}: try later", "busy", device=self.name
                )
        for other in [other for other in self._rounds if other[0] == plan.run]:
            self._drop(other)
        ttl_s = max(TTL_ROUNDS * plan.deadline_s, LEAST_TTL_S)
        asked = self._ask(MessageType.TRAIN, plan, RoundReport, ttl_s, str(plan.round))
        task = asyncio.create_task(asked)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # who waits raises it; perhaps nobody
        self._rounds[key] = _Work(digest, task)
        await asyncio.sleep(0)  # its message is in the outbox

    async def wait(
        self,
        run: str,
        round: int,
        timeout_s: float | None = None,
        on_progress: ProgressCallback | None = None,  # noqa: ARG002
    ) -> RoundReport:
        """``on_progress`` is never called."""
        work = self._rounds.get((run, round))
        if work is None:
            raise DeviceRefusedError(
                f"no round {round} of run {run!r} here: send its plan again", "unknown-round", device=self.name
            )
        await asyncio.wait([work.task], timeout=timeout_s)
        if not work.task.done():
            raise DeviceTimeoutError(f"did not finish round {round} within {timeout_s:g} s", device=self.name)
        if work.task.cancelled():
            raise DeviceFailedError(f"round {round} was cancelled", device=self.name)
        return work.task.result()

    async def cancel(self, run: str, round: int) -> None:
        self._drop((run, round))

    async def evaluate(self, request: EvaluateRequest, timeout_s: float | None = None) -> EvaluateReport:
        await self._check_fits(request)
        ttl_s = max(TTL_ROUNDS * (timeout_s or 0.0), LEAST_TTL_S)
        asked = self._ask(MessageType.EVALUATE, request, EvaluateReport, ttl_s)
        try:
            return await asyncio.wait_for(asked, timeout_s)
        except asyncio.TimeoutError as error:
            raise DeviceTimeoutError(
                f"did not finish an evaluation within {timeout_s:g} s", device=self.name
            ) from error

    async def ask(
        self,
        question: Question,  # noqa: ARG002 - refused, whatever it is
        timeout_s: float | None = None,  # noqa: ARG002
        on_answer: AnswerCallback | None = None,  # noqa: ARG002
    ) -> Answer:
        """Refused: Flower carries rounds and evaluations alone."""
        raise DeviceRefusedError("is reached over Flower, which carries no questions", "not-found", device=self.name)

    async def aclose(self) -> None:
        for key in list(self._rounds):
            self._drop(key)

    # --- inside --------------------------------------------------------------------------------------------------

    def _working(self) -> list[tuple[str, int]]:
        return [key for key, work in self._rounds.items() if not work.task.done()]

    def _drop(self, key: tuple[str, int]) -> None:
        if (work := self._rounds.pop(key, None)) is not None:
            work.task.cancel()

    async def _check_fits(self, asked: RoundPlan | EvaluateRequest) -> None:
        info = self._info or await self.status()
        if (found := misfit(info, asked.model_fingerprint, asked.task)) is not None:
            raise DeviceRefusedError(f"{self.name} {found.reason}", found.code)

    async def _ask(self, kind: str, message: Message | None, reply: type[M], ttl_s: float, group: str = "") -> M:
        node = self._nodes.node_of(self.name)
        if node is None:
            raise DeviceUnreachableError(f"no node of Flower calls itself {self.name}: is its SuperNode running?")
        content = packed(message)
        self.bytes_down += size_of(content)
        answer = await self._nodes.ask(node, kind, content, ttl_s, group)
        self.bytes_up += size_of(answer)
        return answer_of(answer, reply, self.name)
