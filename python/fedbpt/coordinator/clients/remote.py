"""`RemoteDevice`: a `DeviceClient` by the requests of a device (`fedbpt.device.agent.http`), over any `Transport`."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from http import HTTPStatus
from typing import Final, TypeVar
from urllib.parse import quote

from fedbpt.coordinator.clients.base import AnswerCallback, ProgressCallback
from fedbpt.coordinator.clients.transport import NoReplyError, Response, Transport
from fedbpt.coordinator.report_checks import check_progress
from fedbpt.coordinator.slots import Slots
from fedbpt.errors import (
    DeviceFailedError,
    DeviceRefusedError,
    DeviceTimeoutError,
    DeviceUnreachableError,
    WireError,
)
from fedbpt.protocol import codec
from fedbpt.protocol.polling import Method
from fedbpt.protocol.questions import Answer, Question
from fedbpt.protocol.refusals import refusal_of
from fedbpt.protocol.rounds import (
    DeviceInfo,
    ErrorReply,
    EvaluateReport,
    EvaluateRequest,
    RanksResult,
    RoundPlan,
    RoundProgress,
    RoundReport,
    SearchHistory,
)
from fedbpt.protocol.specs import Message
from fedbpt.search.compact_plans import REFUSALS, may_shorten, short_plan, whole_report

M = TypeVar("M", bound=Message)
D = TypeVar("D", bound="RemoteDevice")

log = logging.getLogger(__name__)

POLL_S: Final = 5.0
"""How long the device may hold a poll open: also how often progress is heard of."""

SOONEST_S: Final = 0.5
"""Between two polls of a device that answers at once that it is not done."""

ANSWER_S: Final = 5.0
"""How long the network and the device may take for anything beyond that."""

RETRY_S: Final = 5.0
"""How long a device may be out of reach before a call gives up."""


def _nothing() -> None:
    pass


class RemoteDevice:
    """Reaches a device by ``transport``. See `DeviceClient` for the methods.

    Args:
        name: the coordinator's name for the device.
        retry_s: how long to try again, with growing pauses, while there is no reply.
        answer_s: how long one reply may take, beyond a poll's hold.
        poll_s: how long the device may hold a poll open, at most 60.
    """

    def __init__(
        self,
        transport: Transport,
        name: str,
        retry_s: float = RETRY_S,
        answer_s: float = ANSWER_S,
        poll_s: float = POLL_S,
    ) -> None:
        self.name = name
        self.where = transport.where
        self.bytes_up = 0
        self.bytes_down = 0
        self._transport = transport
        self._retry_s, self._answer_s, self._poll_s = retry_s, answer_s, poll_s
        self._plan: RoundPlan | None = None  # the latest
        self._replays = True  # the device can make a plan's state itself
        self._heard: dict[tuple[str, int], int] = {}  # by run and first generation: of a search, what the device knows

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.where})"

    async def status(self) -> DeviceInfo:
        return self._decode(await self._request("GET", "/v1/status"), DeviceInfo)

    async def start(self, plan: RoundPlan, history: SearchHistory | None = None) -> None:
        self._plan = plan
        await self._hand_over(plan, history)

    async def wait(
        self, run: str, round: int, timeout_s: float | None = None, on_progress: ProgressCallback | None = None
    ) -> RoundReport:
        plan, path = self._plan, _round_path(run, round)
        deadline = _deadline(timeout_s)
        if plan is not None and (plan.run, plan.round) == (run, round) and may_shorten(plan.work):
            short = f"{path}?short=1"
            report = await self._poll(short, RoundReport, f"round {round}", timeout_s, on_progress, deadline)
            if (whole := await self._whole(report, plan)) is not None:
                return whole
        return await self._poll(path, RoundReport, f"round {round}", timeout_s, on_progress, deadline)

    async def work(
        self,
        plan: RoundPlan,
        history: SearchHistory | None = None,
        on_progress: ProgressCallback | None = None,
        slots: Slots | None = None,
    ) -> RoundReport:
        """In one exchange, where the transport holds a plan and the device is done in time."""
        self._plan = plan
        hold_s = self._poll_s if self._transport.holds_plans else 0.0
        async with (slots or Slots()).acquire() as release:
            taken = partial(_call, asyncio.get_running_loop(), release) if hold_s else _nothing
            answer = await self._hand_over(plan, history, hold_s, taken)
        if isinstance(answer, RoundReport):
            if (report := await self._whole(answer, plan)) is not None:
                return report
        elif hold_s:
            self._under_way(answer, f"round {plan.round}", on_progress)
        return await self.wait(plan.run, plan.round, None, on_progress)

    async def cancel(self, run: str, round: int) -> None:
        await self._request("DELETE", _round_path(run, round))

    async def evaluate(self, request: EvaluateRequest, timeout_s: float | None = None) -> EvaluateReport:
        path = f"/v1/evaluate/{codec.digest(request)}"
        body = codec.encode(request)
        deadline = _deadline(timeout_s)

        async def begin() -> None:
            self._decode(await self._request("POST", "/v1/evaluate", body), RoundProgress)

        await begin()
        in_reach = True
        try:
            return await self._poll_again(begin, path, deadline, timeout_s)
        except DeviceUnreachableError:
            in_reach = False
            raise
        finally:
            if in_reach:  # the result is here, or nobody wants it any more
                await self._forget(path)

    async def ask(
        self, question: Question, timeout_s: float | None = None, on_answer: AnswerCallback | None = None
    ) -> Answer:
        path, deadline = f"/v1/questions/{codec.digest(question)}", _deadline(timeout_s)
        await self._request("POST", "/v1/questions", codec.encode(question))
        try:
            answer = Answer()
            while _now() < deadline:
                hold = min(self._poll_s, deadline - _now())
                seen = f"{path}?wait={hold:.3f}&seen={answer.n}"
                answer = self._decode(await self._request("GET", seen, hold_s=hold), Answer)
                if answer.done:
                    return answer
                if on_answer is not None:
                    on_answer(answer)
            raise DeviceTimeoutError(f"did not finish an answer within {timeout_s:g} s", device=self.name)
        finally:
            await self._forget(path)

    async def aclose(self) -> None:
        await self._transport.aclose()

    def twin(self: D) -> D:
        """Another client of this device, with connections and counts of its own: for another event loop."""
        made = copy.copy(self)
        made._transport = self._transport.twin()
        made.bytes_up = made.bytes_down = 0
        made._plan, made._heard = None, {}
        return made

    async def answers(self, timeout_s: float) -> bool:
        """Whether the device answers within ``timeout_s``, asked once."""
        return await self._transport.answers(timeout_s)

    # --- plans ---------------------------------------------------------------------------------------------------

    async def _hand_over(
        self,
        plan: RoundPlan,
        history: SearchHistory | None,
        hold_s: float = 0.0,
        taken: Callable[[], None] = _nothing,
    ) -> RoundProgress | RoundReport:
        """What the device answers that has accepted ``plan``: within ``hold_s`` seconds, its report."""
        if history is not None and (answer := await self._hand_over_ranks(plan, history, hold_s, taken)) is not None:
            return answer
        return await self._post_plan(plan, hold_s, taken)

    async def _hand_over_ranks(
        self, plan: RoundPlan, history: SearchHistory, hold_s: float, taken: Callable[[], None]
    ) -> RoundProgress | RoundReport | None:
        """Let the device make ``plan`` of the ranks it lacks, or of all of them where it lost its search; None: it
        needs the state.
        """
        search = plan.run, history.first
        for known in sorted({self._heard.get(search, history.first), history.first}, reverse=True):
            short = short_plan(plan, history, known)
            if not self._replays or len(codec.encode(short)) > len(codec.encode(plan)):
                return None
            try:
                answer = await self._post_plan(short, hold_s, taken)
            except DeviceRefusedError as error:
                if error.code not in REFUSALS:
                    raise
                log.info("%s needs more than the latest ranks (%s)", self.name, error)
            else:
                self._heard = {search: history.first + len(history.ranks) // history.popsize}
                return answer
        self._replays = False
        return None

    async def _post_plan(
        self, plan: RoundPlan, hold_s: float, taken: Callable[[], None]
    ) -> RoundProgress | RoundReport:
        path = _round_path(plan.run, plan.round)
        if hold_s:
            path += f"?wait={hold_s:.3f}{'&short=1' if may_shorten(plan.work) else ''}"
        answer = await self._request("POST", path, codec.encode(plan), hold_s, taken)
        if answer.status == HTTPStatus.OK:
            return self._decode(answer, RoundReport)
        return self._decode(answer, RoundProgress)

    async def _whole(self, report: RoundReport, plan: RoundPlan) -> RoundReport | None:
        """See `whole_report`; the search is repeated in a thread."""
        if not isinstance(report.result, RanksResult):
            return report
        return await asyncio.to_thread(whole_report, report, plan)

    # --- polling -------------------------------------------------------------------------------------------------

    async def _poll_again(
        self, begin: Callable[[], Awaitable[None]], path: str, deadline: float, timeout_s: float | None
    ) -> EvaluateReport:
        # A device that was restarted has forgotten the evaluation: it is asked again, in bounded number.
        for attempts_left in (2, 1, 0):
            try:
                return await self._poll(path, EvaluateReport, "an evaluation", timeout_s, None, deadline)
            except DeviceRefusedError as error:
                if error.code != "unknown-evaluation" or not attempts_left:
                    raise
            await begin()
        raise DeviceUnreachableError("keeps forgetting an evaluation: is it being restarted?", device=self.name)

    async def _poll(
        self, path: str, kind: type[M], what: str, timeout_s: float | None, on_progress: ProgressCallback | None,
        deadline: float,
    ) -> M:  # fmt: skip
        while True:
            began, hold = _now(), max(min(self._poll_s, deadline - _now()), 0.0)
            query = f"{'&' if '?' in path else '?'}wait={hold:.3f}"
            response = await self._request("GET", path + query, hold_s=hold)
            if response.status == HTTPStatus.OK:
                return self._decode(response, kind)
            self._under_way(self._decode(response, RoundProgress), what, on_progress)
            if _now() >= deadline:
                raise DeviceTimeoutError(f"did not finish {what} within {timeout_s:g} s", device=self.name)
            # one that does not hold the poll must not keep the coordinator, and its log, busy
            await asyncio.sleep(began + min(hold, SOONEST_S) - _now())

    def _under_way(self, progress: RoundProgress, what: str, on_progress: ProgressCallback | None) -> None:
        check_progress(progress)
        if progress.state == "cancelled":
            raise DeviceFailedError(f"{what} was cancelled", device=self.name)
        if on_progress is not None:
            on_progress(progress)

    async def _forget(self, path: str) -> None:
        try:
            await self._request("DELETE", path)
        except (DeviceUnreachableError, DeviceRefusedError):
            return  # it drops the result by itself in time; the caller's own outcome is what matters

    # --- one request ---------------------------------------------------------------------------------------------

    async def _request(
        self,
        method: Method,
        path: str,
        body: bytes | None = None,
        hold_s: float = 0.0,
        taken: Callable[[], None] = _nothing,
    ) -> Response:
        """The 2xx answer, tried again for ``retry_s`` seconds; otherwise raises what `DeviceClient` says."""
        give_up = _now() + self._retry_s
        pause, held = 0.1, False
        while True:
            self.bytes_down += len(body or b"")
            try:
                response = await self._transport.send(method, path, body, hold_s + self._answer_s, taken)
            except NoReplyError as error:
                problem = str(error)
                # A poll that was held for long and then broke: patience counts from here, once.
                if not held and error.begun:
                    give_up, held = max(give_up, _now() + self._retry_s), True
            except WireError as error:
                raise WireError(f"{self.name}: {error}") from error
            else:
                self.bytes_up += len(response.content)
                if response.status not in (429, 502, 503, 504):
                    return self._accepted(response)
                problem = f"answers {response.status} {HTTPStatus(response.status).phrase}: is it running?"
                pause = max(pause, response.retry_after_s)
            if _now() + pause >= give_up:
                raise DeviceUnreachableError(f"{problem} ({self.where})", device=self.name)
            await asyncio.sleep(pause)
            pause = min(pause * 2, 1.0)

    def _accepted(self, response: Response) -> Response:
        if 200 <= response.status < 300:
            return response
        try:
            reply = codec.decode(response.content, ErrorReply)
        except WireError as error:
            raise DeviceRefusedError(
                f"{self.where} answered {response.status} and not as a fedbpt device does: is this its address?",
                "not-a-device",
                device=self.name,
            ) from error
        raise refusal_of(reply, self.name)

    def _decode(self, response: Response, kind: type[M]) -> M:
        if response.kind.split(";")[0].strip().lower() != codec.CONTENT_TYPE:
            raise DeviceRefusedError(
                f"{self.where} does not answer as a fedbpt device does: is this its address?",
                "not-a-device",
                device=self.name,
            )
        try:
            return codec.decode(response.content, kind)
        except WireError as error:
            raise WireError(f"{self.name}: {error}") from error


def _round_path(run: str, round: int) -> str:
    return f"/v1/rounds/{quote(run, safe='')}/{round}"


def _call(loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(what)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _deadline(timeout_s: float | None) -> float:
    return float("inf") if timeout_s is None else _now() + timeout_s
