"""`FlowerClient`: a client for a device that is a node of Flower. A round is one message and one reply.

A SuperNode processes one message at a time, each in a process of its own. So there is no progress during a round, and
a node's work cannot be stopped: cancelling it only ignores the reply.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final, TypeVar

import msgspec
from flwr.app import MessageType

from fedbpt.coordinator.clients.base import AnswerCallback, ProgressCallback, Works
from fedbpt.errors import DeviceFailedError, DeviceRefusedError, DeviceTimeoutError, DeviceUnreachableError
from fedbpt.flower.nodes import REPLY_S, Nodes
from fedbpt.flower.records import packed, reply_of, size_of
from fedbpt.protocol import codec
from fedbpt.protocol.membership import misfit
from fedbpt.protocol.questions import Answer, Question
from fedbpt.protocol.rounds import DeviceInfo, EvaluateReport, EvaluateRequest, RoundPlan, RoundReport, SearchHistory
from fedbpt.protocol.specs import Message

M = TypeVar("M", bound=Message)

TTL_ROUNDS: Final = 3.0
"""How long Flower keeps a plan and its reply, in round deadlines: late reports are recorded until then."""

MIN_TTL_S: Final = 3600.0
"""Minimum time for which Flower keeps messages, in seconds."""


@dataclass
class _Work:
    digest: str
    task: asyncio.Task[RoundReport]

    @property
    def failed(self) -> bool:
        return self.task.done() and (self.task.cancelled() or self.task.exception() is not None)


class FlowerClient(Works):
    """A client for the device that reports ``name`` as its name. See `DeviceClient` for the methods.

    ``reply_s``: time limit for status requests, in seconds.
    """

    def __init__(self, name: str, nodes: Nodes, *, reply_s: float = REPLY_S) -> None:
        self.name = name
        self.bytes_up = 0
        self.bytes_down = 0
        self.due_s = 0.0
        self._nodes = nodes
        self._reply_s = reply_s
        self._info: DeviceInfo | None = None
        self._rounds: dict[tuple[str, int], _Work] = {}

    def __repr__(self) -> str:
        return f"FlowerClient({self.name!r})"

    async def status(self) -> DeviceInfo:
        """The device's status. While it works, the last one known, because it would reply only afterwards."""
        if (info := self._nodes.take_info(self.name)) is not None:
            self.bytes_up += len(codec.encode(info))
            self._info = info
        elif self._info is not None and self._working():
            return msgspec.structs.replace(self._info, busy=True)
        else:
            try:
                request = self._request(MessageType.QUERY, None, DeviceInfo, self._reply_s)
                self._info = await asyncio.wait_for(request, self._reply_s)
            except asyncio.TimeoutError as error:
                raise DeviceUnreachableError("does not respond: is its SuperNode running?", device=self.name) from error
            except DeviceUnreachableError:
                await self._nodes.discover()  # it may be back under another id
                raise
        return self._info

    async def start(
        self,
        plan: RoundPlan,
        history: SearchHistory | None = None,  # noqa: ARG002 - sent whole
        share: float | None = None,  # noqa: ARG002 - not sent
    ) -> None:
        await self._check_fits(plan)
        key = (plan.run, plan.round)
        digest = codec.digest(plan)
        known = self._rounds.get(key)
        if known is not None and known.digest != digest:
            raise DeviceRefusedError(
                f"round {plan.round} was started with another plan: use another run name", "conflict", device=self.name
            )
        if known is not None and not known.failed:
            return
        for run, round in self._working():
            if run != plan.run:
                raise DeviceRefusedError(
                    f"is working on round {round} of run {run!r}: try again later", "busy", device=self.name
                )
        for other in [other for other in self._rounds if other[0] == plan.run]:
            self._drop(other)
        ttl_s = max(TTL_ROUNDS * plan.deadline_s, MIN_TTL_S)
        task = asyncio.create_task(self._request(MessageType.TRAIN, plan, RoundReport, ttl_s, str(plan.round)))
        # Retrieve the exception, so that asyncio does not log it if nobody waits for the report.
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._rounds[key] = _Work(digest, task)
        await asyncio.sleep(0)  # let the task put its message into the outbox

    async def wait(
        self,
        run: str,
        round: int,
        timeout_s: float | None = None,
        on_progress: ProgressCallback | None = None,  # noqa: ARG002
    ) -> RoundReport:
        """See `DeviceClient.wait`. ``on_progress`` is never called."""
        work = self._rounds.get((run, round))
        if work is None:
            raise DeviceRefusedError(
                f"has no round {round} of run {run!r}: send its plan again", "unknown-round", device=self.name
            )
        await asyncio.wait([work.task], timeout=timeout_s)
        if not work.task.done():
            message = f"did not finish round {round} within {timeout_s:g} s: allow more time"
            raise DeviceTimeoutError(message, device=self.name)
        if work.task.cancelled():
            raise DeviceFailedError(f"round {round} was cancelled", device=self.name)
        return work.task.result()

    async def cancel(self, run: str, round: int) -> None:
        self._drop((run, round))

    async def evaluate(self, request: EvaluateRequest, timeout_s: float | None = None) -> EvaluateReport:
        await self._check_fits(request)
        ttl_s = max(TTL_ROUNDS * (timeout_s or 0.0), MIN_TTL_S)
        try:
            return await asyncio.wait_for(
                self._request(MessageType.EVALUATE, request, EvaluateReport, ttl_s), timeout_s
            )
        except asyncio.TimeoutError as error:
            raise DeviceTimeoutError(
                f"did not finish an evaluation within {timeout_s:g} s: allow more time", device=self.name
            ) from error

    async def ask(
        self,
        question: Question,  # noqa: ARG002 - always refused
        timeout_s: float | None = None,  # noqa: ARG002
        on_answer: AnswerCallback | None = None,  # noqa: ARG002
    ) -> Answer:
        """Always refused: over Flower there are only rounds and evaluations."""
        raise DeviceRefusedError("is reached over Flower, which supports no questions", "not-found", device=self.name)

    async def aclose(self) -> None:
        for key in list(self._rounds):
            self._drop(key)

    # --- inside --------------------------------------------------------------------------------------------------

    def _working(self) -> list[tuple[str, int]]:
        return [key for key, work in self._rounds.items() if not work.task.done()]

    def _drop(self, key: tuple[str, int]) -> None:
        if (work := self._rounds.pop(key, None)) is not None:
            work.task.cancel()

    async def _check_fits(self, work: RoundPlan | EvaluateRequest) -> None:
        info = self._info or await self.status()
        if (found := misfit(info, work.model_fingerprint, work.task)) is not None:
            raise DeviceRefusedError(f"{self.name} {found.reason}", found.code)

    async def _request(
        self, kind: str, message: Message | None, reply_kind: type[M], ttl_s: float, group: str = ""
    ) -> M:
        node = self._nodes.node_of(self.name)
        if node is None:
            raise DeviceUnreachableError(f"no Flower node is named {self.name}: is its SuperNode running?")
        content = packed(message)
        self.bytes_down += size_of(content)
        reply = await self._nodes.request(node, kind, content, ttl_s, group)
        self.bytes_up += size_of(reply)
        return reply_of(reply, reply_kind, self.name)
