"""`TransportClient`: a `DeviceClient` that sends the requests of `fedbpt.device.agent.http` over any `Transport`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from http import HTTPStatus
from typing import Final, TypeVar
from urllib.parse import quote

from fedbpt.coordinator.clients.base import AnswerCallback, ProgressCallback
from fedbpt.coordinator.clients.transport import NoResponseError, Response, Transport
from fedbpt.coordinator.devices.slots import Slots
from fedbpt.coordinator.reports.report_checks import check_progress
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
    Work,
)
from fedbpt.protocol.specs import Message
from fedbpt.search.compact_plans import REFUSALS, may_shorten, short_plan, whole_report

M = TypeVar("M", bound=Message)

log = logging.getLogger(__name__)

POLL_S: Final = 5.0
"""How long the device may hold a poll, which is also how often progress is reported."""

MIN_POLL_S: Final = 0.5
"""Shortest interval between two polls of a device that does not hold them."""

RESPONSE_S: Final = 5.0
"""How long the network and the device may take for a response, beyond a hold."""

RETRY_S: Final = 5.0
"""How long a call tries to reach a device that does not respond."""


def _nothing() -> None:
    pass


class TransportClient:
    """Reaches a device over ``transport``. See `DeviceClient` for the methods.

    Args:
        name: the coordinator's name for the device.
        retry_s: how long to try again, with growing pauses, while there is no response.
        response_s: how long a response may take, beyond a hold.
        poll_s: how long the device may hold a poll, at most 60.
    """

    def __init__(
        self,
        transport: Transport,
        name: str,
        retry_s: float = RETRY_S,
        response_s: float = RESPONSE_S,
        poll_s: float = POLL_S,
    ) -> None:
        self.name = name
        self.where = transport.where
        self.bytes_up = 0
        self.bytes_down = 0
        self._transport = transport
        self._retry_s = retry_s
        self._response_s = response_s
        self._poll_s = poll_s
        self._plan: RoundPlan | None = None  # the latest
        self._share: float | None = None  # that it is drawn from
        self._replays = transport.sends_short  # the device can replay a search
        self._known: dict[tuple[str, int], int] = {}  # by run and first generation: generations that the device knows

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.where})"

    async def status(self) -> DeviceInfo:
        return self._decode(await self._request("GET", "/v1/status"), DeviceInfo)

    @property
    def due_s(self) -> float:
        """See `DeviceClient.due_s`."""
        return 0.0

    async def start(self, plan: RoundPlan, history: SearchHistory | None = None, share: float | None = None) -> None:
        self._plan, self._share = plan, share
        await self._send_plan(plan, history)

    async def wait(
        self, run: str, round: int, timeout_s: float | None = None, on_progress: ProgressCallback | None = None
    ) -> RoundReport:
        plan = self._plan
        path = _round_path(run, round)
        deadline = _deadline(timeout_s)
        if plan is not None and (plan.run, plan.round) == (run, round) and self._may_shorten(plan.work):
            short = f"{path}?short=1"
            report = await self._poll(short, RoundReport, f"round {round}", timeout_s, on_progress, deadline)
            whole = await self._whole(report, plan)
            if whole is not None:
                return whole
        return await self._poll(path, RoundReport, f"round {round}", timeout_s, on_progress, deadline)

    async def work(
        self,
        plan: RoundPlan,
        history: SearchHistory | None = None,
        on_progress: ProgressCallback | None = None,
        slots: Slots | None = None,
        share: float | None = None,
    ) -> RoundReport:
        """See `DeviceClient.work`. One exchange, if the transport holds plans and the device is done in time."""
        self._plan, self._share = plan, share
        hold_s = self._poll_s if self._transport.holds_plans else 0.0
        async with (slots or Slots()).acquire() as release:
            delivered = partial(_call_in, asyncio.get_running_loop(), release) if hold_s else _nothing
            reply = await self._send_plan(plan, history, hold_s, delivered)
        if isinstance(reply, RoundReport):
            report = await self._whole(reply, plan)
            if report is not None:
                return report
        elif hold_s:
            self._check_running(reply, f"round {plan.round}", on_progress)
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
            return await self._poll_evaluation(begin, path, deadline, timeout_s)
        except DeviceUnreachableError:
            in_reach = False
            raise
        finally:
            if in_reach:  # the result is here, or is not needed any more
                await self._discard(path)

    async def ask(
        self, question: Question, timeout_s: float | None = None, on_answer: AnswerCallback | None = None
    ) -> Answer:
        path = f"/v1/questions/{codec.digest(question)}"
        deadline = _deadline(timeout_s)
        await self._request("POST", "/v1/questions", codec.encode(question))
        try:
            answer = Answer()
            while _now() < deadline:
                hold_s = min(self._poll_s, deadline - _now())
                poll = f"{path}?wait={hold_s:.3f}&seen={answer.n}"
                answer = self._decode(await self._request("GET", poll, hold_s=hold_s), Answer)
                if answer.done:
                    return answer
                if on_answer is not None:
                    on_answer(answer)
            message = f"did not finish an answer within {timeout_s:g} s: allow more time"
            raise DeviceTimeoutError(message, device=self.name)
        finally:
            await self._discard(path)

    async def aclose(self) -> None:
        await self._transport.aclose()

    # --- plans ---------------------------------------------------------------------------------------------------

    async def _send_plan(
        self,
        plan: RoundPlan,
        history: SearchHistory | None,
        hold_s: float = 0.0,
        delivered: Callable[[], None] = _nothing,
    ) -> RoundProgress | RoundReport:
        """The reply of a device that has accepted ``plan``: its report, if it is done within ``hold_s`` seconds."""
        if history is not None and self._replays:
            reply = await self._send_ranks(plan, history, hold_s, delivered)
            if reply is not None:
                return reply
        return await self._post_plan(plan, hold_s, delivered)

    async def _send_ranks(
        self, plan: RoundPlan, history: SearchHistory, hold_s: float, delivered: Callable[[], None]
    ) -> RoundProgress | RoundReport | None:
        """Send the ranks that the device lacks, or all of them if it lost its search; None: it needs the state."""
        search = plan.run, history.first
        for known in sorted({self._known.get(search, history.first), history.first}, reverse=True):
            short = short_plan(plan, history, known)
            if len(codec.encode(short)) > len(codec.encode(plan)):
                return None
            try:
                reply = await self._post_plan(short, hold_s, delivered)
            except DeviceRefusedError as error:
                if error.code not in REFUSALS:
                    raise
                log.info("%s needs more than the latest ranks (%s)", self.name, error)
            else:
                self._known = {search: history.first + len(history.ranks) // history.popsize}
                return reply
        self._replays = False
        return None

    async def _post_plan(
        self, plan: RoundPlan, hold_s: float, delivered: Callable[[], None]
    ) -> RoundProgress | RoundReport:
        query = [] if self._share is None else [f"share={self._share!r}"]
        if hold_s:
            query += [f"wait={hold_s:.3f}", *(["short=1"] if self._may_shorten(plan.work) else [])]
        path = f"{_round_path(plan.run, plan.round)}{'?' if query else ''}{'&'.join(query)}"
        response = await self._request("POST", path, codec.encode(plan), hold_s, delivered)
        if response.status == HTTPStatus.OK:
            return self._decode(response, RoundReport)
        return self._decode(response, RoundProgress)

    def _may_shorten(self, work: Work) -> bool:
        return self._transport.sends_short and may_shorten(work)

    async def _whole(self, report: RoundReport, plan: RoundPlan) -> RoundReport | None:
        """See `whole_report`; the search is repeated in a thread."""
        if not isinstance(report.result, RanksResult):
            return report
        return await asyncio.to_thread(whole_report, report, plan)

    # --- polling -------------------------------------------------------------------------------------------------

    async def _poll_evaluation(
        self, begin: Callable[[], Awaitable[None]], path: str, deadline: float, timeout_s: float | None
    ) -> EvaluateReport:
        # A device that was restarted has forgotten the evaluation: begin it again, a few times.
        for attempts_left in (2, 1, 0):
            try:
                return await self._poll(path, EvaluateReport, "an evaluation", timeout_s, None, deadline)
            except DeviceRefusedError as error:
                if error.code != "unknown-evaluation" or not attempts_left:
                    raise
            await begin()
        raise DeviceUnreachableError("keeps forgetting an evaluation: is it being restarted?", device=self.name)

    async def _poll(
        self,
        path: str,
        kind: type[M],
        what: str,
        timeout_s: float | None,
        on_progress: ProgressCallback | None,
        deadline: float,
    ) -> M:
        while True:
            began = _now()
            hold_s = max(min(self._poll_s, deadline - began), 0.0)
            query = f"{'&' if '?' in path else '?'}wait={hold_s:.3f}"
            response = await self._request("GET", path + query, hold_s=hold_s)
            if response.status == HTTPStatus.OK:
                return self._decode(response, kind)
            self._check_running(self._decode(response, RoundProgress), what, on_progress)
            if _now() >= deadline:
                message = f"did not finish {what} within {timeout_s:g} s: allow more time"
                raise DeviceTimeoutError(message, device=self.name)
            # A device that does not hold polls must not keep the coordinator, and its log, busy.
            await asyncio.sleep(began + min(hold_s, MIN_POLL_S) - _now())

    def _check_running(self, progress: RoundProgress, what: str, on_progress: ProgressCallback | None) -> None:
        check_progress(progress)
        if progress.state == "cancelled":
            raise DeviceFailedError(f"{what} was cancelled", device=self.name)
        if on_progress is not None:
            on_progress(progress)

    async def _discard(self, path: str) -> None:
        try:
            await self._request("DELETE", path)
        except (DeviceUnreachableError, DeviceRefusedError):
            return  # the device drops the result in time anyway; the caller's own outcome is what matters

    # --- one request ---------------------------------------------------------------------------------------------

    async def _request(
        self,
        method: Method,
        path: str,
        body: bytes | None = None,
        hold_s: float = 0.0,
        delivered: Callable[[], None] = _nothing,
    ) -> Response:
        """The 2xx response, tried again for ``retry_s`` seconds; otherwise raises as `DeviceClient` says."""
        give_up = _now() + self._retry_s
        pause = 0.1
        was_held = False
        while True:
            self.bytes_down += len(body or b"")
            try:
                response = await self._transport.send(method, path, body, hold_s + self._response_s, delivered)
            except NoResponseError as error:
                problem = str(error)
                # A poll that was held for long and then broke: the time to retry begins here, once.
                if not was_held and error.begun:
                    give_up = max(give_up, _now() + self._retry_s)
                    was_held = True
            except WireError as error:
                raise WireError(f"{self.name}: {error}", field=error.field, limit=error.limit) from error
            else:
                self.bytes_up += len(response.content)
                if response.status not in (429, 502, 503, 504):
                    return self._accepted(response)
                problem = f"responds {response.status} {HTTPStatus(response.status).phrase}: check that it is running"
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
            raise self._not_a_device() from error
        raise refusal_of(reply, self.name)

    def _decode(self, response: Response, kind: type[M]) -> M:
        if response.content_type.split(";")[0].strip().lower() != codec.CONTENT_TYPE:
            raise self._not_a_device()
        try:
            return codec.decode(response.content, kind)
        except WireError as error:
            raise WireError(f"{self.name}: {error}", field=error.field, limit=error.limit) from error

    def _not_a_device(self) -> DeviceRefusedError:
        return DeviceRefusedError(
            f"{self.where} is not a fedbpt device: check its address", "not-a-device", device=self.name
        )


def _round_path(run: str, round: int) -> str:
    return f"/v1/rounds/{quote(run, safe='')}/{round}"


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _deadline(timeout_s: float | None) -> float:
    return float("inf") if timeout_s is None else _now() + timeout_s
