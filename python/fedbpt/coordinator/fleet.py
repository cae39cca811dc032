"""`Fleet`: the devices of a run, which of them count right now, and one round or evaluation over them.

A device is *live* (it is given work), *lost* (it failed: it is skipped, and looked for in the background until it
answers), or *late* (it still works on a round that closed without it: it is skipped until it has delivered).
So a device costs a round at most its deadline, and later rounds nothing until it is back.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, Final

from fedbpt.coordinator.clients.base import DeviceClient
from fedbpt.coordinator.members import INVITATIONS, Draft, Listener, Member, OpenRound, describe_absent
from fedbpt.coordinator.report_checks import check_evaluation, check_report
from fedbpt.coordinator.slots import Turns
from fedbpt.coordinator.stragglers import Pace
from fedbpt.errors import (
    DeviceError,
    DeviceFailedError,
    DeviceRefusedError,
    DeviceUnreachableError,
    FedbptError,
    QuorumError,
    WireError,
)
from fedbpt.net.deadlines import within
from fedbpt.plain_text import MOST_TOLD, one_line
from fedbpt.protocol.membership import misfit
from fedbpt.protocol.rounds import (
    DeviceInfo,
    EvaluateReport,
    EvaluateRequest,
    RoundPlan,
    RoundProgress,
    RoundReport,
    SearchHistory,
)
from fedbpt.protocol.task_identity import TaskIdentity

log = logging.getLogger(__name__)

PROBE_S: Final = (0.25, 5.0)
"""First and longest pause between two looks for a lost device."""

GREETED_AT_ONCE: Final = 32

CANCEL_S: Final = 3.0
"""How long devices may take to hear that the run stops."""


class Fleet:
    """The members by name. Only those with ``task`` count. Use within one event loop; `aclose` at the end."""

    def __init__(self, clients: Mapping[str, DeviceClient], task: TaskIdentity, listener: Listener, pace: Pace) -> None:
        self.members = {name: Member(client) for name, client in clients.items()}
        self.round = 0
        self._listener = listener
        self._pace = pace
        self._task = task
        self._fingerprint: str | None = None
        self._turns = Turns()
        self._changed = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._over = False
        self._called_off: set[str] = set()  # late devices that were told not to go on

    @property
    def live(self) -> list[Member]:
        return [member for member in self.members.values() if member.state == "live"]

    @property
    def infos(self) -> list[DeviceInfo]:
        """What the live devices said of themselves last."""
        return [member.info for member in self.live if member.info is not None]

    # --- membership ----------------------------------------------------------------------------------------------

    async def connect(self) -> list[DeviceInfo]:
        """Ask every device who it is; who does not answer, or has another task, is lost. Returns the others' infos."""

        turns = Turns(GREETED_AT_ONCE)

        async def greeted(member: Member) -> DeviceInfo | FedbptError:
            async with turns.one():
                return await self._ask(member)

        answers = await asyncio.gather(*map(greeted, self.members.values()))
        for member, answer in zip(self.members.values(), answers, strict=True):
            problem = str(answer)
            if isinstance(answer, DeviceInfo):
                self._meet(member, answer)
                problem = self.unfit(member)
            if problem:
                self._lose(member, problem, probe=False)
            else:
                member.state = "live"
        return self.infos

    def require_model(self, fingerprint: str) -> None:
        """From now on only devices with this model count; lost ones are looked for."""
        self._fingerprint = fingerprint
        for member in self.members.values():
            if member.state == "live" and (problem := self.unfit(member)):
                self._lose(member, problem)
            elif member.state == "lost":
                self._spawn(self._probe(member))

    def unfit(self, member: Member) -> str:
        """Why what ``member`` said of itself keeps it out of the run; empty: nothing does."""
        found = None if member.info is None else misfit(member.info, self._fingerprint, self._task)
        return "" if found is None else f"it {found.reason}"

    async def _ask(self, member: Member) -> DeviceInfo | FedbptError:
        try:
            return await member.client.status()
        except (DeviceError, WireError) as error:
            return error

    def _meet(self, member: Member, info: DeviceInfo) -> None:
        if member.info is None:
            self._listener.met(member.name, info)
        member.heard(info)

    def _lose(self, member: Member, reason: str, probe: bool = True, until_idle: bool = False) -> None:
        if self._over:
            return  # it is not needed any more
        reason = one_line(reason, MOST_TOLD)
        member.state, member.reason = "lost", reason
        self._listener.lost(member.name, self.round, reason)
        if probe:
            self._spawn(self._probe(member, until_idle))

    async def _probe(self, member: Member, until_idle: bool = False) -> None:
        """Look for a lost device until it answers with model and task of the run (and is not busy); then it is live."""
        pause, longest = PROBE_S
        while True:
            await asyncio.sleep(pause)
            pause = min(pause * 2, longest)
            answer = await self._ask(member)
            if not isinstance(answer, DeviceInfo):
                member.reason = one_line(str(answer), MOST_TOLD)
                continue
            self._meet(member, answer)
            if problem := self.unfit(member):
                member.reason = problem
                continue
            if answer.busy and until_idle:
                continue
            self._return(member)
            return

    def _return(self, member: Member) -> None:
        member.state, member.reason = "live", ""
        self._listener.back(member.name, self.round)
        self._changed.set()

    # --- a round -------------------------------------------------------------------------------------------------

    async def run_round(
        self,
        round: int,
        plan_for: Callable[[str], RoundPlan],
        needed: int,
        deadline_s: float,
        kind: str = "",
        draft: Draft | None = None,
        history: SearchHistory | None = None,
        budget_s: float = math.inf,
    ) -> list[RoundReport]:
        """Reports of one round, sorted by device. Ends when all that were asked have answered, or at the deadline.

        Args:
            round, plan_for: what each device is asked.
            needed: so many reports at least.
            deadline_s: longest that the round takes.
            kind: of its work: a device that takes much longer than it usually does for this kind is late, once there
                are ``needed`` reports.
            draft: whom to ask, and how many reports end the round; None: all live devices.
            history: of the search that the round belongs to, where there is one.
            budget_s: when the run has spent its time: without ``needed`` reports the devices are then stopped, and
                there are none.

        Raises:
            QuorumError: fewer than ``needed`` reports at the deadline; lost devices may come back until then.
        """
        everybody = Draft(tuple(self.members), len(self.members), len(self.members))
        now = asyncio.get_running_loop().time()
        current = OpenRound(round, kind, draft or everybody, needed, deadline_s, now, budget_s, history)
        self.round = round
        try:
            while True:
                self._changed.clear()
                self._check_background()
                self._invite(current, plan_for)
                left = self._time_left(current)
                if left <= 0:
                    break
                await self._wait_changed(left)
                while current.ended:
                    self._take(current.ended.pop(), current)
            await self._close_round(current)
        except BaseException:
            for task in current.working:
                task.cancel()
            await asyncio.gather(*current.working, return_exceptions=True)
            raise
        return [current.reports[name] for name in sorted(current.reports)]

    def _invite(self, current: OpenRound, plan_for: Callable[[str], RoundPlan]) -> None:
        asked = {*current.reports, *(member.name for member in current.working.values())}
        if len(asked) >= current.draft.asked:
            return
        for name in current.draft.order:
            member = self.members[name]
            if (
                member.state == "live"
                and name not in asked
                and current.may_ask(name)
                and len(asked) < current.draft.asked
            ):
                asked.add(name)
                current.invited[name] += 1
                current.since[name] = asyncio.get_running_loop().time()
                task = asyncio.create_task(self._work(member, plan_for(name), current.history))
                current.working[task] = member
                task.add_done_callback(lambda task: self._on_work_end(task, current))

    def _time_left(self, current: OpenRound) -> float:
        """How many seconds the round may still wait for a report; 0: it is over."""
        working, enough = current.working.values(), len(current.reports) >= current.needed
        if len(current.reports) >= current.draft.wanted or (not working and (enough or not self._may_reach(current))):
            return 0.0
        now, end = asyncio.get_running_loop().time(), current.began + current.limit_s
        if enough:  # nobody waits for stragglers
            end = min(end, max(current.since[m.name] + self._pace.limit(m.name, current.kind) for m in working))
        return end - now

    def _may_reach(self, current: OpenRound) -> bool:
        """Whether waiting on can help: enough devices have reported or may still be asked."""
        may = [name for name in self.members if name in current.reports or current.may_ask(name)]
        return len(may) >= current.needed

    def _on_work_end(self, task: asyncio.Task[RoundReport], current: OpenRound) -> None:
        if task in current.working:
            current.ended.append(task)
            self._changed.set()

    async def _wait_changed(self, timeout_s: float) -> None:
        with suppress(asyncio.TimeoutError):
            await within(timeout_s, self._changed.wait())

    def _take(self, task: asyncio.Task[RoundReport], current: OpenRound) -> None:
        """Count a finished task's report, or lose its device; only one out of reach may try this round again."""
        member = current.working.pop(task)
        try:
            report = current.reports[member.name] = task.result()
        except DeviceUnreachableError as error:
            self._lose(member, str(error))
        except (DeviceError, WireError) as error:
            busy = isinstance(error, DeviceRefusedError) and error.code == "busy"
            if not busy:
                current.barred.add(member.name)
            if isinstance(error, DeviceFailedError):
                current.failures[member.name] = error
            self._lose(member, str(error), until_idle=busy)
        else:
            member.peak_rss_bytes = max(member.peak_rss_bytes, report.peak_rss_bytes)
            seconds = asyncio.get_running_loop().time() - current.since[member.name]
            self._pace.took(member.name, current.kind, seconds)

    async def _close_round(self, current: OpenRound) -> None:
        reported, took = len(current.reports), asyncio.get_running_loop().time() - current.began
        left_out = reported < current.needed and took >= current.budget_s
        for task, member in list(current.working.items()):
            del current.working[task]
            if left_out:
                task.cancel()
            elif took >= current.budget_s or reported >= current.draft.wanted:  # or asked for safety alone
                task.cancel()
                self._spawn(self._cancel([(member, key) for key in member.sent]))
            else:
                member.state = "late"
                member.reason = f"round {current.number} was not done after {min(took, current.deadline_s):.3g} s"
                self._listener.lost(member.name, current.number, member.reason)
                self._spawn(self._await_late(task, member))
        if left_out:
            await self._withdraw(current)
        else:
            self._require_no_common_failure(current)
            self.require_quorum(reported, current.needed, current.deadline_s)

    async def _withdraw(self, current: OpenRound) -> None:
        """Have the devices forget a round that is left out: the next one has its number."""
        current.reports.clear()
        asked = [self.members[name] for name in current.invited]
        await self._cancel([(member, key) for member in asked for key in member.sent])
        for member in asked:
            member.sent = set()

    def _require_no_common_failure(self, current: OpenRound) -> None:
        """Raises `QuorumError` where what was asked is refused by all, and alike: asked again, it would be again."""
        reasons = {error.reason for error in current.failures.values()}
        is_fault = any(error.is_fault for error in current.failures.values())
        if len(reasons) == 1 and set(current.failures) == set(current.invited) and not is_fault:
            raise QuorumError(f"round {self.round}: no device could do its work: {reasons.pop()}")

    def require_quorum(self, reported: int, needed: int, deadline_s: float) -> None:
        """Raises `QuorumError` where fewer than ``needed`` have reported in the current round."""
        if reported < needed:
            raise QuorumError(
                f"round {self.round}: {reported} of {len(self.members)} devices reported (deadline {deadline_s:g} s),"
                f" {needed} are needed{self.missing()}; start the same run again to resume it"
            )

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Lose the devices in ``reasons``, whose reports cannot be used, until they answer again."""
        for name, reason in reasons.items():
            self._lose(self.members[name], reason)

    def missing(self) -> str:
        """`` (a: why; b: why)`` of the devices that do not count now, or nothing."""
        return describe_absent(self.members.values())

    async def _work(self, member: Member, plan: RoundPlan, history: SearchHistory | None) -> RoundReport:
        """One device's report on ``plan``, which is sent again where the device was restarted."""

        def progress(where: RoundProgress) -> None:
            self._listener.progress(member.name, where)

        key = (plan.run, plan.round)
        replaces = key not in member.sent
        member.sent = {key}
        for _ in range(INVITATIONS):
            try:
                report = await member.client.work(plan, history, progress, self._turns)
            except DeviceRefusedError as error:
                if error.code == "conflict" and replaces:
                    # Left by a coordinator that had other settings, under this run's name: it is ours to replace, once.
                    replaces = False
                    await member.client.cancel(*key)
                elif error.code == "unknown-round":
                    log.info("%s forgot round %d: its plan is sent again", member.name, plan.round)
                else:
                    raise
                continue
            try:
                check_report(report, plan, member.info.n_train if member.info else None)
            except WireError as error:
                raise WireError(f"{member.name}: its report is refused: {error}") from error
            return report
        raise DeviceFailedError(
            f"forgot round {plan.round} {INVITATIONS} times: is it being restarted?", device=member.name
        )

    async def _await_late(self, task: asyncio.Task[RoundReport], member: Member) -> None:
        try:
            report = await task
        except (DeviceError, WireError) as error:
            if isinstance(error, DeviceFailedError) and member.name in self._called_off:
                self._return(member)  # it did as it was told
            else:
                self._lose(member, str(error))
            return
        finally:
            task.cancel()
        self._listener.late(report)
        self._return(member)

    # --- an evaluation -------------------------------------------------------------------------------------------

    async def evaluate(self, request: EvaluateRequest, timeout_s: float) -> dict[str, EvaluateReport]:
        """Reports of the live devices that have such rows and answer in time, by name; the others are lost."""
        self._check_background()
        members = [member for member in self.live if member.n_rows(request)]
        answers = await asyncio.gather(*(self._evaluate(member, request, timeout_s) for member in members))
        return {m.name: answer for m, answer in zip(members, answers, strict=True) if answer is not None}

    async def _evaluate(self, member: Member, request: EvaluateRequest, timeout_s: float) -> EvaluateReport | None:
        try:
            report = await member.client.evaluate(request, timeout_s)
            check_evaluation(report, request, member.n_rows(request))
        except (DeviceError, WireError) as error:
            self._lose(member, f"evaluation: {error}")
            return None
        return report

    async def settle(self, timeout_s: float) -> None:
        """Take late devices off their closed rounds, and wait a moment for devices to be live again."""
        late = [member for member in self.members.values() if member.state == "late"]
        self._called_off |= {member.name for member in late}
        await self._cancel([(member, key) for member in late for key in member.sent])
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while loop.time() < deadline and (not self.live or any(member.state != "live" for member in late)):
            self._check_background()
            self._changed.clear()
            await self._wait_changed(min(deadline - loop.time(), 0.5))

    # --- the end -------------------------------------------------------------------------------------------------

    async def cancel_rounds(self) -> None:
        """The run is over: tell every device in reach to stop what it was given. Nobody is waited for long, and who
        leaves from now on is not lost.
        """
        self._over = True
        await self._cancel([(member, key) for member in self.members.values() for key in member.sent])

    async def _cancel(self, work: list[tuple[Member, tuple[str, int]]]) -> None:
        async def tell(member: Member, key: tuple[str, int]) -> None:
            async with self._turns.one():
                try:
                    await within(CANCEL_S, member.client.cancel(*key))
                except (DeviceError, WireError, asyncio.TimeoutError) as error:
                    log.info("%s could not be told to stop: %s", member.name, error or type(error).__name__)

        await asyncio.gather(*(tell(*each) for each in work))

    async def aclose(self) -> None:
        """Stop looking for devices, and close their clients."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await asyncio.gather(*(member.client.aclose() for member in self.members.values()))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._on_background_end)

    def _on_background_end(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # A fault while nobody waited (the store, a listener): the round loop raises it.
            self._failure = self._failure or error
            self._changed.set()

    def _check_background(self) -> None:
        if self._failure is not None:
            raise self._failure
