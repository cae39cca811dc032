"""`Fleet`: the devices of a run, their states, and one round or evaluation over them.

A device is *live* (it is given work), *lost* (it failed: it is skipped, and probed in the background until it answers),
or *late* (it still works on a round that closed without it: it is skipped until it has reported). So a device delays a
round by at most its deadline, and later rounds not at all until it is back.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Container, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from msgspec import UNSET

from fedbpt.coordinator.clients.base import DeviceClient
from fedbpt.coordinator.devices.members import MAX_ATTEMPTS, Cohort, Listener, Member, OpenRound, describe_absent
from fedbpt.coordinator.devices.slots import Slots
from fedbpt.coordinator.devices.stragglers import Pace
from fedbpt.coordinator.reports.report_checks import check_evaluation, check_report
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
"""First and longest pause between two probes of a lost device."""

CONNECTED_AT_ONCE: Final = 32

RECHECK_S: Final = 1.0
"""Interval at which a round that is short of devices looks for those that have called."""

CANCEL_S: Final = 3.0
"""Time limit of telling a device to stop."""


class Fleet:
    """The members by name; those without ``task`` are lost. For one event loop; `aclose` at the end."""

    def __init__(self, clients: Mapping[str, DeviceClient], task: TaskIdentity, listener: Listener, pace: Pace) -> None:
        self.members = {name: Member(client) for name, client in clients.items()}
        self.round = 0
        self.asked: frozenset[str] = frozenset()
        """The devices that the last round asked."""
        self.is_short = False
        """Whether the open round has asked fewer devices than it is to."""
        self._listener = listener
        self._pace = pace
        self._task = task
        self._fingerprint: str | None = None
        self._slots = Slots()
        self._changed = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._over = False
        self._called_off: set[str] = set()  # late devices that were told to stop

    @property
    def live(self) -> list[Member]:
        return [member for member in self.members.values() if member.state == "live"]

    @property
    def infos(self) -> list[DeviceInfo]:
        """The latest infos of the live devices."""
        return [member.info for member in self.live if member.info is not None]

    # --- membership ----------------------------------------------------------------------------------------------

    async def connect(self) -> list[DeviceInfo]:
        """Ask every device for its status, and return the infos of the live ones.

        Devices that do not answer, or have another task, are lost.
        """
        slots = Slots(CONNECTED_AT_ONCE)

        async def status(member: Member) -> DeviceInfo | FedbptError:
            async with slots.acquire():
                return await self._status(member)

        found = await asyncio.gather(*map(status, self.members.values()))
        for member, info in zip(self.members.values(), found, strict=True):
            if isinstance(info, DeviceInfo):
                self._update_info(member, info)
                problem = self.unfit(member)
            else:
                problem = str(info)
            if problem:
                self._lose(member, problem, probe=False)
            else:
                member.state = "live"
        return self.infos

    def require_model(self, fingerprint: str) -> None:
        """Lose the devices with another model, and start to probe the lost ones."""
        self._fingerprint = fingerprint
        for member in self.members.values():
            if member.state == "live" and (problem := self.unfit(member)):
                self._lose(member, problem)
            elif member.state == "lost":
                self._spawn(self._probe(member))

    def unfit(self, member: Member) -> str:
        """Why ``member`` cannot take part, by its info; empty: it can."""
        found = None if member.info is None else misfit(member.info, self._fingerprint, self._task)
        return "" if found is None else f"it {found.reason}"

    async def _status(self, member: Member) -> DeviceInfo | FedbptError:
        try:
            return await member.client.status()
        except (DeviceError, WireError) as error:
            return error

    def _update_info(self, member: Member, info: DeviceInfo) -> None:
        if member.info is None:
            self._listener.connected(member.name, info)
        member.update_info(info)

    def _lose(self, member: Member, reason: str, probe: bool = True, until_idle: bool = False) -> None:
        if self._over:
            return
        reason = one_line(reason, MOST_TOLD)
        member.state = "lost"
        member.reason = reason
        self._listener.lost(member.name, self.round, reason)
        if probe:
            self._spawn(self._probe(member, until_idle))

    async def _probe(self, member: Member, until_idle: bool = False) -> None:
        """Ask a lost device for its status until it has the run's model and task (and is idle); then it is live."""
        pause, longest = PROBE_S
        while True:
            await asyncio.sleep(pause)
            pause = min(pause * 2, longest)
            info = await self._status(member)
            if not isinstance(info, DeviceInfo):
                member.reason = one_line(str(info), MOST_TOLD)
                continue
            self._update_info(member, info)
            if problem := self.unfit(member):
                member.reason = problem
                continue
            if info.busy and until_idle:
                continue
            self._return(member)
            return

    def _return(self, member: Member) -> None:
        member.state = "live"
        member.reason = ""
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
        cohort: Cohort | None = None,
        history: SearchHistory | None = None,
        budget_s: float = math.inf,
    ) -> list[RoundReport]:
        """The reports of one round, sorted by device. Ends when all invited devices have reported, or at the deadline.

        Args:
            round, plan_for: number of the round, and the plan of each device.
            needed: fewest reports.
            deadline_s: time limit of the round.
            kind: of its work. Once there are ``needed`` reports, a device that takes much longer than usual for this
                kind is late.
            cohort: the devices to invite, and how many reports end the round; None: all live devices.
            history: of the search that the round belongs to.
            budget_s: time left of the run's budget. If there are fewer than ``needed`` reports by then, the devices are
                stopped and no reports are returned.

        Raises:
            QuorumError: fewer than ``needed`` reports at the deadline; lost devices may come back until then.
        """
        everybody = Cohort(tuple(self.members), len(self.members), len(self.members))
        now = asyncio.get_running_loop().time()
        current = OpenRound(round, kind, cohort or everybody, needed, deadline_s, now, budget_s, history)
        self.round = round
        self.asked = frozenset()
        try:
            while True:
                self._changed.clear()
                self._check_background()
                self._invite(current, plan_for)
                left = self._time_left(current)
                if left <= 0:
                    break
                await self._wait_changed(min(left, RECHECK_S) if self.is_short else left)
                while current.ended:
                    self._take(current.ended.pop(), current)
            self.asked = frozenset(current.invited)
            self.is_short = False
            await self._close_round(current)
        except BaseException:
            for task in current.working:
                task.cancel()
            await asyncio.gather(*current.working, return_exceptions=True)
            raise
        return [current.reports[name] for name in sorted(current.reports)]

    def _invite(self, current: OpenRound, plan_for: Callable[[str], RoundPlan]) -> None:
        order, n_drawn = current.cohort.order, current.cohort.n_drawn
        left = current.began + current.limit_s - asyncio.get_running_loop().time()
        due = sorted(due_s for due_s in self._ask(order[:n_drawn], current, plan_for) if due_s + RECHECK_S < left)
        n_missing = current.n_missing
        current.may_fill = 0 < n_missing <= len(due)
        if current.may_fill:
            filled_at = asyncio.get_running_loop().time() + due[n_missing - 1] + RECHECK_S
            current.filled_at = min(current.filled_at, filled_at)
        elif n_missing and n_drawn is not None:
            self._ask(order[n_drawn:], current, plan_for)
        self.is_short = current.n_missing > 0

    def _ask(self, names: Sequence[str], current: OpenRound, plan_for: Callable[[str], RoundPlan]) -> list[float]:
        """Give the round to as many of ``names`` as it is short of; of a draft, to those that wait for work.

        Returns the seconds until each other one of a draft that may work is to call.
        """
        is_draft = current.cohort.n_drawn is not None
        asked = {*current.reports, *(member.name for member in current.working.values())}
        due: list[float] = []
        for name in names:
            if not current.n_missing:
                break
            if name in asked or not self._may_work(name, current):
                continue
            member = self.members[name]
            if is_draft and (due_s := member.client.due_s):
                due.append(due_s)
                continue
            current.invited[name] += 1
            current.since[name] = asyncio.get_running_loop().time()
            task = asyncio.create_task(self._work(member, plan_for(name), current))
            current.working[task] = member
            task.add_done_callback(lambda task: self._on_work_end(task, current))
        return due

    def _may_work(self, name: str, current: OpenRound) -> bool:
        return self.members[name].state == "live" and current.may_invite(name)

    def _time_left(self, current: OpenRound) -> float:
        """Seconds that the round may still wait for a report; 0: it is over."""
        working = current.working.values()
        is_enough = len(current.reports) >= current.needed
        if len(current.reports) >= current.cohort.wanted:
            return 0.0
        if not working and not (current.may_fill if is_enough else self._may_reach_quorum(current)):
            return 0.0
        now = asyncio.get_running_loop().time()
        end = current.began + current.limit_s
        if is_enough:  # do not wait for stragglers
            ends = [current.since[m.name] + self._pace.limit(m.name, current.kind) for m in working]
            end = min(end, max([*ends, current.filled_at] if current.may_fill else ends))
        return end - now

    def _may_reach_quorum(self, current: OpenRound) -> bool:
        """Whether enough devices have reported or may still be invited."""
        candidates = [name for name in current.cohort.order if name in current.reports or current.may_invite(name)]
        return len(candidates) >= current.needed

    def _on_work_end(self, task: asyncio.Task[RoundReport], current: OpenRound) -> None:
        if task in current.working:
            current.ended.append(task)
            self._changed.set()

    async def _wait_changed(self, timeout_s: float) -> None:
        with suppress(asyncio.TimeoutError):
            await within(timeout_s, self._changed.wait())

    def _take(self, task: asyncio.Task[RoundReport], current: OpenRound) -> None:
        """Count a finished task's report, or lose its device; only an unreachable one may try this round again."""
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
            self._listener.reported(report)
            member.peak_rss_bytes = max(member.peak_rss_bytes, report.peak_rss_bytes)
            seconds = asyncio.get_running_loop().time() - current.since[member.name]
            self._pace.took(member.name, current.kind, seconds)

    async def _close_round(self, current: OpenRound) -> None:
        reported = len(current.reports)
        took = asyncio.get_running_loop().time() - current.began
        left_out = reported < current.needed and took >= current.budget_s
        for task, member in list(current.working.items()):
            del current.working[task]
            if left_out:
                task.cancel()
            elif took >= current.budget_s or reported >= current.cohort.wanted:  # over-selected
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
        """Have the devices forget a round that is left out: the next one has the same number."""
        current.reports.clear()
        invited = [self.members[name] for name in current.invited]
        await self._cancel([(member, key) for member in invited for key in member.sent])
        for member in invited:
            member.sent = set()

    async def withdraw(self, run: str, round: int) -> None:
        """Have the live devices forget a round that is to be done again."""
        await self._cancel([(member, (run, round)) for member in self.live])
        for member in self.live:
            member.sent = set()

    def _require_no_common_failure(self, current: OpenRound) -> None:
        """Raise `QuorumError` if the work failed on all devices for the same reason: it would fail again."""
        reasons = {error.reason for error in current.failures.values()}
        is_fault = any(error.is_fault for error in current.failures.values())
        if len(reasons) == 1 and set(current.failures) == set(current.invited) and not is_fault:
            raise QuorumError(f"round {self.round} failed on every device: {reasons.pop()}")

    def require_quorum(self, reported: int, needed: int, deadline_s: float) -> None:
        """Raise `QuorumError` if fewer than ``needed`` devices have reported in the current round."""
        if reported < needed:
            raise QuorumError(
                f"round {self.round}: {reported} of {len(self.members)} devices reported (deadline {deadline_s:g} s),"
                f" {needed} are needed{self.missing()}; start the same run again to resume it",
                limit=needed,
            )

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Lose the devices in ``reasons``, whose reports cannot be used, until they answer a probe."""
        for name, reason in reasons.items():
            self._lose(self.members[name], reason)

    def missing(self) -> str:
        """`` (a: why; b: why)`` of the devices that are not live; empty: all are."""
        return describe_absent(self.members.values())

    async def _work(self, member: Member, plan: RoundPlan, current: OpenRound) -> RoundReport:
        """One device's report on ``plan``, which is sent again if the device was restarted."""
        share = current.cohort.share(member.name)

        def progress(where: RoundProgress) -> None:
            self._listener.progress(member.name, where)

        key = (plan.run, plan.round)
        replaces = key not in member.sent
        member.sent = {key}
        for _ in range(MAX_ATTEMPTS):
            try:
                report = await member.client.work(plan, current.history, progress, self._slots, share)
            except DeviceRefusedError as error:
                if error.code == "conflict" and replaces:
                    # Left by a coordinator with other settings, under this run's name: replace it, once.
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
                raise WireError(f"{member.name}: report refused: {error}", field=error.field) from error
            return report
        raise DeviceFailedError(
            f"forgot round {plan.round} {MAX_ATTEMPTS} times: is it being restarted?", device=member.name
        )

    async def _await_late(self, task: asyncio.Task[RoundReport], member: Member) -> None:
        try:
            report = await task
        except (DeviceError, WireError) as error:
            if isinstance(error, DeviceFailedError) and member.name in self._called_off:
                self._return(member)  # it stopped, as it was told
            else:
                self._lose(member, str(error))
            return
        finally:
            task.cancel()
            self._called_off.discard(member.name)
        self._listener.late(report)
        self._return(member)

    # --- an evaluation -------------------------------------------------------------------------------------------

    async def evaluate(
        self, request: EvaluateRequest, timeout_s: float, names: Container[str] | None = None
    ) -> dict[str, EvaluateReport]:
        """By name, the reports of the live devices that have such rows; devices that do not report in time are lost.

        ``names``: of the devices that are asked; None: all.
        """
        self._check_background()
        members = [m for m in self.live if m.n_rows(request) and (names is None or m.name in names)]
        reports = await asyncio.gather(*(self._evaluate(member, request, timeout_s) for member in members))
        return {m.name: report for m, report in zip(members, reports, strict=True) if report is not None}

    async def _evaluate(self, member: Member, request: EvaluateRequest, timeout_s: float) -> EvaluateReport | None:
        try:
            report = await member.client.evaluate(request, timeout_s)
            check_evaluation(report, request, member.n_rows(request))
        except (DeviceError, WireError) as error:
            asked_answers = request.generation is not UNSET
            if asked_answers and isinstance(error, DeviceRefusedError | DeviceFailedError):  # it scores as before
                log.warning("device %s measured no answers: %s", member.name, error)
            else:
                self._lose(member, f"evaluation: {error}")
            return None
        return report

    async def settle(self, timeout_s: float, without: Container[str] = ()) -> None:
        """Stop late devices, and wait up to ``timeout_s`` seconds for them, and for any device, to be live again.

        ``without``: devices that do not count as any.
        """
        late = [member for member in self.members.values() if member.state == "late"]
        self._called_off |= {member.name for member in late}
        await self._cancel([(member, key) for member in late for key in member.sent])
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s

        def is_settled() -> bool:
            counts = any(member.name not in without for member in self.live)
            return counts and all(member.state == "live" for member in late)

        while loop.time() < deadline and not is_settled():
            self._check_background()
            self._changed.clear()
            await self._wait_changed(min(deadline - loop.time(), 0.5))

    # --- the end -------------------------------------------------------------------------------------------------

    async def cancel_rounds(self) -> None:
        """Stop every device in reach, within `CANCEL_S`. Devices that fail from now on are not lost."""
        self._over = True
        await self._cancel([(member, key) for member in self.members.values() for key in member.sent])

    async def _cancel(self, work: list[tuple[Member, tuple[str, int]]]) -> None:
        async def tell(member: Member, key: tuple[str, int]) -> None:
            if member.client.due_s:
                return  # only a device without work was told to call later
            async with self._slots.acquire():
                try:
                    await within(CANCEL_S, member.client.cancel(*key))
                except (DeviceError, WireError, asyncio.TimeoutError) as error:
                    log.info("%s could not be told to stop: %s", member.name, error or type(error).__name__)

        await asyncio.gather(*(tell(*each) for each in work))

    async def aclose(self) -> None:
        """Stop the probes, and close the clients."""
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
            # A fault in the background (of the store, of a listener): the round loop raises it.
            self._failure = self._failure or error
            self._changed.set()

    def _check_background(self) -> None:
        if self._failure is not None:
            raise self._failure
