"""`SecureSums`: rounds and evaluations of a `Fleet` of which only sums over its devices are seen (``docs/secure.md``).

It has the fleet's `run_round` and `evaluate`, which return one report: that of all devices' rows. Before the first sum,
and whenever a device has come that has no keys yet, an *epoch* begins: devices make keys for many sums, and share their
secrets with each other. A sum then takes two exchanges: masked results, and the shares that remove the masks.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import msgspec

from fedbpt.coordinator.devices.fleet import Fleet
from fedbpt.coordinator.devices.members import Cohort, Member
from fedbpt.coordinator.reports.report_checks import check_evaluation, check_result
from fedbpt.coordinator.work_kinds import kind_of
from fedbpt.engine.discriminant import LARGEST_SKETCH
from fedbpt.errors import FedbptError, FederationError, QuorumError, WireError
from fedbpt.protocol import codec
from fedbpt.protocol.names import SUM
from fedbpt.protocol.rounds import (
    EvaluateReport,
    EvaluateRequest,
    KeysResult,
    KeysWork,
    MaskedResult,
    MeansWork,
    PublicWork,
    RoundPlan,
    RoundReport,
    SearchHistory,
    SecureUse,
    SecureWork,
    SharesResult,
    SharesWork,
    UnmaskResult,
    UnmaskWork,
)
from fedbpt.secure.layout import Vector, evaluation_of, from_bytes, result_of
from fedbpt.secure.membership import asked_of_all
from fedbpt.secure.party import is_mask_key, is_seed, secret_of, unmasked
from fedbpt.secure.sizes import ATTEMPTS, FEWEST, SEALED_BYTES, USES, threshold_of

log = logging.getLogger(__name__)

SUFFIX: Final = ".secure"
"""Appended to the run's name in exchanges of keys and shares, so that devices distinguish them from its rounds."""

BACK_S: Final = 5.0
"""How long a sum that failed waits for enough devices to be back."""


class _Epoch:
    """Keys and sealed shares of an epoch.

    Attributes:
        names: devices that have shares, in the order of their places.
        keys: of these devices.
        sealed: of those that have shared their secrets, the message for each of ``names``.
        gone: devices that did not answer since, and may have been restarted.
        unable: live devices that made no keys or shares.
    """

    def __init__(self, id: str, found: Mapping[str, KeysResult], live: set[str]) -> None:
        self.id = id
        self.threshold = threshold_of(len(found))
        self.names = tuple(found)
        self.keys = dict(found)
        self.sealed: dict[str, SharesResult] = {}
        self.gone: set[str] = set()
        self.unable = live
        self.used = 0

    @property
    def able(self) -> set[str]:
        """The devices that can take part in a sum."""
        return set(self.sealed) - self.gone

    def share(self, of: str, to: str, index: int) -> bytes:
        """What ``of`` has sealed for ``to`` of sum ``index``."""
        whole = self.sealed[of].sealed[self.names.index(to)]
        return whole[SEALED_BYTES * index : SEALED_BYTES * (index + 1)]


class SecureSums:
    """For one run.

    Args:
        fleet: its devices.
        control_plan: the plan of a device in an exchange of keys or shares; its run and round are replaced.
        row_cap: see `fedbpt.runs.settings.RunSettings`.
        released: called with the round whose noisy sums of rows were unmasked, before they are checked.
    """

    def __init__(
        self,
        fleet: Fleet,
        control_plan: Callable[[str, SecureWork], RoundPlan],
        row_cap: float,
        released: Callable[[int], None],
    ) -> None:
        self._fleet = fleet
        self._control_plan = control_plan
        self._row_cap = row_cap
        self._released = released
        self._epoch: _Epoch | None = None
        self._exchanges = 0

    # --- a round -------------------------------------------------------------------------------------------------

    async def run_round(
        self,
        round: int,
        plan_for: Callable[[str], RoundPlan],
        needed: int,
        deadline_s: float,
        kind: str = "",
        cohort: Cohort | None = None,  # noqa: ARG002 - as `Fleet.run_round`; settings exclude drafts
        history: SearchHistory | None = None,
        budget_s: float = math.inf,
    ) -> list[RoundReport]:
        """One report, that of all devices' rows; none if the budget ended the round.

        Raises as `Fleet.run_round`, and `FederationError` for noisy sums of rows that were seen and cannot be used:
        others would spend ε again.
        """
        if isinstance(plan_for(next(iter(self._fleet.members))).work, PublicWork):  # nothing to hide
            return await self._fleet.run_round(round, plan_for, needed, deadline_s, kind, None, history, budget_s)
        clock = asyncio.get_running_loop().time
        end = clock() + budget_s
        attempts = 0
        while clock() < end:
            attempts += 1
            try:
                return await self._sum(round, plan_for, needed, deadline_s, kind, history, end - clock())
            except (QuorumError, WireError) as error:
                self._epoch = None  # devices may have been restarted
                if attempts == ATTEMPTS or not await self._are_back(max(needed, FEWEST)):
                    raise error if isinstance(error, QuorumError) else QuorumError(str(error)) from error
                log.warning("round %d: a secure sum is tried again: %s", round, error)
                await self._fleet.withdraw(plan_for(next(iter(self._fleet.members))).run, round)
        return []

    async def _sum(
        self,
        round: int,
        plan_for: Callable[[str], RoundPlan],
        needed: int,
        deadline_s: float,
        kind: str,
        history: SearchHistory | None,
        budget_s: float,
    ) -> list[RoundReport]:
        epoch = await self._ready(round, needed, deadline_s)
        any_plan = plan_for(next(iter(self._fleet.members)))
        most_read = kind_of(any_plan.work).max_rows(any_plan.work)

        def rows(member: Member) -> int:
            n_train = member.info.n_train if member.info else 0
            return min(n_train, most_read or n_train)

        # Rows of a private readout all count alike, and so does the noise.
        use = self._next_use(epoch, rows, 0.0 if isinstance(any_plan.work, MeansWork) else self._row_cap)
        if len(use.peers) < max(epoch.threshold, FEWEST):
            raise QuorumError(
                f"round {round}: {len(use.peers)} devices can take part in a secure sum, expected "
                f"{max(epoch.threshold, FEWEST)}{self._fleet.missing()}; start the same run again to resume it",
                limit=FEWEST,
            )

        def plan(device: str) -> RoundPlan:
            return msgspec.structs.replace(plan_for(device), secure=use)

        everybody = Cohort(use.peers, len(use.peers), len(use.peers))
        most = max(needed, epoch.threshold)
        reports = await self._fleet.run_round(round, plan, most, deadline_s, kind, everybody, history, budget_s)
        if not reports:
            return []
        vectors = self._vectors({report.device: report.result for report in reports})
        if len(vectors) < most:  # before anything of the others is seen
            raise QuorumError(
                f"round {round}: {len(vectors)} devices sent sums that fit, expected {most}{self._fleet.missing()}; "
                "start the same run again to resume it",
                limit=most,
            )
        total = await self._unmask(epoch, use, asked_of_all(plan(use.peers[0])), vectors, round, deadline_s)
        reports = [report for report in reports if report.device in vectors]
        if not isinstance(any_plan.work, MeansWork):
            return [_as_report(reports, any_plan, total, use)]
        self._released(round)
        try:
            return [_as_report(reports, any_plan, total, use)]
        except WireError as error:  # not to be tried again
            raise FederationError(
                f"round {round}: {error}; the ε of these noisy sums is spent: give the run another name to ask for "
                "others, which spend as much again",
                field="run",
            ) from error

    # --- an evaluation -------------------------------------------------------------------------------------------

    async def evaluate(self, request: EvaluateRequest, timeout_s: float) -> dict[str, EvaluateReport]:
        """The evaluation over all devices' rows, as of the device `SUM`; empty: too few have such rows, or report."""
        for _ in range(ATTEMPTS):
            have = [member for member in self._fleet.members.values() if member.n_rows(request)]
            if len(have) >= FEWEST:
                await self._are_back(min(len(have), threshold_of(len(self._fleet.members))))
            able = [member for member in have if member.state == "live"]
            if len(able) < FEWEST:
                log.warning("%d devices have %s rows, a secure sum needs %d", len(able), request.split, FEWEST)
                return {}
            try:
                return await self._evaluate(request, timeout_s)
            except (QuorumError, WireError) as error:
                log.warning("a secure evaluation failed: %s", error)
                self._epoch = None
                await self._are_back(FEWEST)
        return {}

    async def _evaluate(self, request: EvaluateRequest, timeout_s: float) -> dict[str, EvaluateReport]:
        round = self._fleet.round
        epoch = await self._ready(round, FEWEST, timeout_s)
        use = self._next_use(epoch, lambda member: member.n_rows(request), 0.0)
        if len(use.peers) < max(epoch.threshold, FEWEST):
            log.warning("%d devices have %s rows, too few for a secure sum", len(use.peers), request.split)
            return {}
        asked = msgspec.structs.replace(request, secure=use)
        found = await self._fleet.evaluate(asked, timeout_s, use.peers)
        epoch.gone |= self._lost()
        if len(found) < epoch.threshold:
            raise QuorumError(f"{len(found)} devices reported, expected {epoch.threshold}", limit=epoch.threshold)
        vectors = self._vectors({name: report.masked for name, report in found.items()})
        total = await self._unmask(epoch, use, asked_of_all(asked), vectors, round, timeout_s)
        report = evaluation_of(total, use, max(report.seconds for report in found.values()))
        check_evaluation(report, msgspec.structs.replace(request, max_rows=request.max_rows * len(vectors)))
        return {SUM: report}

    # --- an epoch ------------------------------------------------------------------------------------------------

    async def _are_back(self, n: int) -> bool:
        """Whether ``n`` devices are live, or come back soon."""
        if len(self._fleet.live) < n:
            await self._fleet.settle(BACK_S)
            end = asyncio.get_running_loop().time() + BACK_S
            while len(self._fleet.live) < n and asyncio.get_running_loop().time() < end:
                await asyncio.sleep(0.1)
        return len(self._fleet.live) >= n

    async def _ready(self, round: int, needed: int, deadline_s: float) -> _Epoch:
        """An epoch with a sum left that all live devices are in that can be."""
        epoch = self._epoch
        live = {member.name for member in self._fleet.live}
        if epoch is not None:
            epoch.gone |= self._lost()
            is_enough = len(live & epoch.able) >= max(needed, epoch.threshold, FEWEST)
            if epoch.used < USES and live - epoch.unable <= epoch.able and is_enough:
                return epoch
        self._epoch = await self._begin(round, needed, deadline_s)
        return self._epoch

    async def _begin(self, round: int, needed: int, deadline_s: float) -> _Epoch:
        id = secrets.token_hex(16)
        live = {member.name for member in self._fleet.live}
        n = max(needed, FEWEST)
        made = await self._exchange(round, lambda _: KeysWork(epoch=id, n_uses=USES), n, deadline_s)
        found = {name: result for name, result in made.items() if isinstance(result, KeysResult)}
        epoch = _Epoch(id, found, live)
        asked = SharesWork(epoch=id, threshold=epoch.threshold, names=epoch.names, keys=tuple(found.values()))
        told = await self._exchange(round, lambda _: asked, max(n, epoch.threshold), deadline_s, epoch.names)
        epoch.sealed = {name: result for name, result in told.items() if isinstance(result, SharesResult)}
        late = {member.name for member in self._fleet.members.values() if member.state == "late"}
        epoch.unable -= late | set(epoch.sealed)
        return epoch

    def _lost(self) -> set[str]:
        """The devices that are lost now: they may be restarted when they are back, without their secrets."""
        return {member.name for member in self._fleet.members.values() if member.state == "lost"}

    def _next_use(self, epoch: _Epoch, rows: Callable[[Member], int], row_cap: float) -> SecureUse:
        """The next sum: over all live devices of the epoch that have rows."""
        members = [member for member in self._fleet.live if member.name in epoch.able and rows(member)]
        counts = [rows(member) for member in members]
        trained = [member.info.n_train for member in members if member.info]
        size = max((member.info.n_embd for member in members if member.info), default=1)
        epoch.used += 1
        return SecureUse(
            epoch=epoch.id,
            index=epoch.used - 1,
            peers=tuple(sorted(member.name for member in members)),
            most_rows=max(math.floor(row_cap * statistics.median(counts)), 1) if row_cap and counts else 0,
            most_counted=max(math.floor(row_cap * statistics.median(trained)), 1) if row_cap and trained else 0,
            largest=LARGEST_SKETCH * 1.01 * max(sum(counts) * size, 1),
        )

    def _vectors(self, results: Mapping[str, object]) -> dict[str, Vector]:
        """The masked vectors with the same fields; devices with others, of another version, are lost."""
        found = {
            name: from_bytes(result.fields, result.data)
            for name, result in sorted(results.items())
            if isinstance(result, MaskedResult)
        }
        usual, _ = Counter(vector.fields for vector in found.values()).most_common(1)[0]
        odd = {name for name, vector in found.items() if vector.fields != usual}
        self._fleet.refuse(dict.fromkeys(odd, "its masked result has other fields than the others': update it"))
        return {name: vector for name, vector in found.items() if name not in odd}

    async def _unmask(
        self, epoch: _Epoch, use: SecureUse, asked: str, masked: Mapping[str, Vector], round: int, deadline_s: float
    ) -> Vector:
        """The sum of the results ``masked``; ``asked``: what they answer, see `fedbpt.secure.party.Party.mask`.

        Raises:
            QuorumError: too few devices revealed their shares.
            WireError: shares that are wrong.
        """
        survivors = tuple(masked)
        dropped = tuple(name for name in use.peers if name not in masked)
        named = (*survivors, *dropped)

        def work(device: str) -> UnmaskWork:
            sealed = tuple(epoch.share(name, device, use.index) for name in named)
            return UnmaskWork(epoch=epoch.id, index=use.index, survivors=survivors, dropped=dropped, sealed=sealed)

        told = await self._exchange(round, work, epoch.threshold, deadline_s, survivors)
        epoch.gone |= self._lost()
        revealed = {name: result.shares for name, result in told.items() if isinstance(result, UnmaskResult)}

        def add_up() -> Vector:
            found = {
                name: secret_of(
                    epoch.names,
                    {to: shares[place] for to, shares in revealed.items()},
                    epoch.threshold,
                    partial(is_seed if name in masked else is_mask_key, found=epoch.keys[name], index=use.index),
                )
                for place, name in enumerate(named)
            }
            seeds = {name: found[name] for name in survivors}
            return unmasked(use, asked, epoch.keys, masked, seeds, {name: found[name] for name in dropped})

        return await asyncio.to_thread(add_up)  # with many devices it takes a second or more

    async def _exchange(
        self,
        round: int,
        work: Callable[[str], SecureWork],
        needed: int,
        deadline_s: float,
        names: tuple[str, ...] | None = None,
    ) -> dict[str, object]:
        """The devices' results of an exchange of keys or shares, by name."""
        self._exchanges += 1
        number = self._exchanges

        def plan(device: str) -> RoundPlan:
            made = self._control_plan(device, work(device))
            return msgspec.structs.replace(made, run=f"{made.run[: 128 - len(SUFFIX)]}{SUFFIX}", round=number)

        chosen = tuple(self._fleet.members) if names is None else names
        cohort = Cohort(chosen, len(chosen), len(chosen))
        reports = await self._fleet.run_round(round, plan, needed, deadline_s, "keys", cohort)
        return {report.device: report.result for report in reports}


def _as_report(reports: list[RoundReport], plan: RoundPlan, total: Vector, use: SecureUse) -> RoundReport:
    """The report of all devices' rows, checked as that of one device."""
    work = plan.work
    result, n_texts = result_of(total, kind_of(work).result, getattr(work, "purpose", None), use)
    found = RoundReport(
        run=plan.run,
        round=plan.round,
        device=SUM,
        plan_digest=codec.digest(plan),
        result=result,
        n_texts=n_texts,
        evaluations=sum(report.evaluations for report in reports),
        tokens=sum(report.tokens for report in reports),
        seconds=max(report.seconds for report in reports),
        peak_rss_bytes=max(report.peak_rss_bytes for report in reports),
        devices=tuple(report.device for report in reports),
    )
    try:
        check_result(found, plan)
    except FedbptError as error:
        raise WireError(f"the sum over {len(reports)} devices is not possible: {error}", field="result") from error
    return found
