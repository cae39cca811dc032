"""`HttpClient`: the coordinator's adapter for a device that runs an HTTP server (`fedbpt.device.agent.http`)."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Final, NamedTuple, TypeVar
from urllib.parse import quote

import httpx

from fedbpt.coordinator.clients.base import AnswerCallback, ProgressCallback, Works
from fedbpt.coordinator.report_checks import check_progress
from fedbpt.errors import (
    ConfigError,
    DeviceFailedError,
    DeviceRefusedError,
    DeviceTimeoutError,
    DeviceUnreachableError,
    WireError,
)
from fedbpt.net.bodies import retry_after
from fedbpt.net.deadlines import within
from fedbpt.net.server import IDLE_S
from fedbpt.net.tls import Tls, certificate_problem, is_loopback
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

log = logging.getLogger(__name__)

POLL_S: Final = 5.0
"""How long the device may hold a poll open: also how often progress is heard of."""

SOONEST_S: Final = 0.5
"""Between two polls of a device that answers at once that it is not done."""

ANSWER_S: Final = 5.0
"""How long the network and the device may take for anything beyond that."""

RETRY_S: Final = 5.0
"""How long a device may be out of reach before a call gives up."""


class Response(NamedTuple):
    """A device's answer; ``kind``: its content's type."""

    status: int
    kind: str
    content: bytes
    retry_after_s: float = 0.0


class HttpClient(Works):
    """Reaches the device at ``url``, such as ``http://pi5:8401``. See `DeviceClient` for the methods.

    Args:
        name: the coordinator's name for the device; None: host and port (``pi5-8401``). Give one where the address
            may change between the sittings of a run.
        retry_s: how long to try again, with growing pauses, while there is no answer.
        answer_s: how long one answer may take, beyond a poll's hold.
        token: the secret that the device asks for; never sent over plain HTTP beyond loopback.
        tls: for an https address, whom to believe and what to show.
        poll_s: how long the device may hold a poll open, at most 60.
    """

    def __init__(
        self,
        url: str,
        name: str | None = None,
        retry_s: float = RETRY_S,
        answer_s: float = ANSWER_S,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        poll_s: float = POLL_S,
    ) -> None:
        try:
            self._url = httpx.URL(url.rstrip("/"))
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ConfigError(f"{url!r} is no device address: give one like http://pi5:8401") from error
        if self._url.scheme not in ("http", "https") or not self._url.host or self._url.userinfo:
            raise ConfigError(f"{url!r} is no device address: give one like http://pi5:8401")
        if token and self._url.scheme == "http" and not is_loopback(self._url.host):
            raise ConfigError(f"a token is not sent to {url} unencrypted: serve the device with TLS, and give https://")
        self.url = self.where = str(self._url)
        self.name = name or _name_of(self._url)
        self.bytes_up = 0
        self.bytes_down = 0
        self._retry_s = retry_s
        self._answer_s = answer_s
        self._poll_s = poll_s
        self._authorization = {"authorization": f"Bearer {token}"} if token else {}
        self._token, self._tls = token, tls
        self._verify = (tls or Tls()).client_context() if self._url.scheme == "https" else False
        self._http: httpx.AsyncClient | None = None
        self._plan: RoundPlan | None = None  # the latest
        self._replays = True  # the device can make a plan's state itself
        self._heard: dict[tuple[str, int], int] = {}  # by run and first generation: of a search, what the device knows

    def __repr__(self) -> str:
        return f"HttpClient({self.url!r}, name={self.name!r})"

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
        if self._http is not None:
            http, self._http = self._http, None
            await http.aclose()

    def twin(self) -> HttpClient:
        """Another client of this device, with connections and counts of its own: for another event loop."""
        return HttpClient(
            self.url, self.name, self._retry_s, self._answer_s, token=self._token, tls=self._tls, poll_s=self._poll_s
        )  # fmt: skip

    async def answers(self, timeout_s: float) -> bool:
        """Whether the device answers within ``timeout_s``, asked once."""
        try:
            await within(timeout_s, self._exchange("GET", "/healthz", None, timeout_s))
        except (httpx.TransportError, asyncio.TimeoutError, WireError):
            return False
        return True

    # --- plans ---------------------------------------------------------------------------------------------------

    async def _hand_over(
        self, plan: RoundPlan, history: SearchHistory | None, hold_s: float = 0.0
    ) -> RoundProgress | RoundReport:
        """What the device answers that has accepted ``plan``: within ``hold_s`` seconds, its report."""
        if history is not None and (answer := await self._hand_over_ranks(plan, history, hold_s)) is not None:
            return answer
        return await self._post_plan(plan, hold_s)

    async def _hand_over_ranks(
        self, plan: RoundPlan, history: SearchHistory, hold_s: float
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
                answer = await self._post_plan(short, hold_s)
            except DeviceRefusedError as error:
                if error.code not in REFUSALS:
                    raise
                log.info("%s needs more than the latest ranks (%s)", self.name, error)
            else:
                self._heard = {search: history.first + len(history.ranks) // history.popsize}
                return answer
        self._replays = False
        return None

    async def _post_plan(self, plan: RoundPlan, hold_s: float) -> RoundProgress | RoundReport:
        path = _round_path(plan.run, plan.round)
        if hold_s:
            path += f"?wait={hold_s:.3f}{'&short=1' if may_shorten(plan.work) else ''}"
        answer = await self._request("POST", path, codec.encode(plan), hold_s)
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

    async def _request(self, method: Method, path: str, body: bytes | None = None, hold_s: float = 0.0) -> Response:
        """The 2xx answer, tried again for ``retry_s`` seconds; otherwise raises what `DeviceClient` says."""
        give_up = _now() + self._retry_s
        pause, held = 0.1, False
        while True:
            try:
                response = await self._exchange(method, path, body, hold_s + self._answer_s)
                if response.status not in (429, 502, 503, 504):
                    return self._accepted(response)
                problem = f"answers {response.status} {HTTPStatus(response.status).phrase}: is it running?"
                pause = max(pause, response.retry_after_s)
            except (httpx.TransportError, httpx.InvalidURL, asyncio.TimeoutError) as error:
                problem = certificate_problem(error) or f"{_explain(error)}: is it running and in reach?"
                # A poll that was held for long and then broke: patience counts from here, once.
                if not held and isinstance(error, httpx.ReadError | httpx.RemoteProtocolError):
                    give_up, held = max(give_up, _now() + self._retry_s), True
            if _now() + pause >= give_up:
                raise DeviceUnreachableError(f"{problem} ({self.where})", device=self.name)
            await asyncio.sleep(pause)
            pause = min(pause * 2, 1.0)

    async def _exchange(self, method: Method, path: str, body: bytes | None, read_s: float) -> Response:
        if self._http is None:
            self._http = httpx.AsyncClient(
                # The machine's proxies are for the web, not for a device on the local network.
                trust_env=False,
                verify=self._verify,
                headers={
                    "accept": codec.CONTENT_TYPE,
                    "accept-encoding": "identity",
                    "user-agent": "fedbpt",
                    **self._authorization,
                },
                limits=httpx.Limits(max_connections=8, max_keepalive_connections=2, keepalive_expiry=IDLE_S),
            )
        headers = {"content-type": codec.CONTENT_TYPE} if body is not None else {}
        timeout = httpx.Timeout(self._answer_s, read=read_s, connect=min(self._answer_s, max(self._retry_s, 1.0)))
        url = self.url.rstrip("/") + path
        self.bytes_down += len(body or b"")
        async with self._http.stream(method, url, content=body, headers=headers, timeout=timeout) as response:
            # The time-outs above are for each read; a device that drips bytes must not hold the coordinator.
            content = await within(read_s + self._answer_s, self._read(response))
        kind = response.headers.get("content-type", "")
        return Response(response.status_code, kind, content, retry_after(response.headers))

    async def _read(self, response: httpx.Response) -> bytes:
        content = bytearray()
        async for chunk in response.aiter_raw():
            self.bytes_up += len(chunk)
            content += chunk
            if len(content) > codec.MAX_BODY_BYTES:
                raise WireError(f"{self.name} sent a body over the limit of {codec.MAX_BODY_BYTES} bytes")
        return bytes(content)

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


def _name_of(url: httpx.URL) -> str:
    port = f"-{url.port}" if url.port else ""
    return re.sub(r"[^A-Za-z0-9._-]", "-", f"{url.host}{port}").lstrip("._-") or "device"


def _explain(error: Exception) -> str:
    if isinstance(error, httpx.TimeoutException | asyncio.TimeoutError):
        return "does not answer"
    if isinstance(error, httpx.ConnectError):
        return "cannot be reached"
    return f"broke the connection ({type(error).__name__})"


def _now() -> float:
    return asyncio.get_running_loop().time()


def _deadline(timeout_s: float | None) -> float:
    return float("inf") if timeout_s is None else _now() + timeout_s
