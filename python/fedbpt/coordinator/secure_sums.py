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
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from fedbpt.coordinator.fleet import Fleet
from fedbpt.coordinator.members import Cohort
from fedbpt.coordinator.report_checks import check_evaluation, check_result
from fedbpt.coordinator.work_kinds import kind_of
from fedbpt.engine.discriminant import LARGEST_SKETCH
from fedbpt.errors import FedbptError, QuorumError, WireError
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import (
    EvaluateReport,
    EvaluateRequest,
    KeysResult,
    KeysWork,
    MaskedResult,
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
from fedbpt.secure.party import secret_of, unmasked
from fedbpt.secure.sizes import FEWEST, SEALED_BYTES, USES

log = logging.getLogger(__name__)

SUM: Final = "sum"
"""Name of the device that a sum stands for."""

SUFFIX: Final = ".secure"
"""Appended to the run's name in exchanges of keys and shares, so that devices distinguish them from its rounds."""

ATTEMPTS: Final = 3
"""How often a sum is tried: devices may drop out before enough of them have revealed their shares."""


class _Epoch:
    """Keys and sealed shares of an epoch.

    Attributes:
        names: devices that have shares, in the order of their places.
        keys: of these devices.
        sealed: of those that have shared their secrets, the message for each of ``names``.
        gone: devices that were lost since, and may have been restarted.
    """

    def __init__(self, id: str, threshold: int, found: Mapping[str, KeysResult]) -> None:
        self.id = id
        self.threshold = threshold
        self.names = tuple(found)
        self.keys = dict(found)
        self.sealed: dict[str, SharesResult] = {}
        self.gone: set[str] = set()
        self.used = 0

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
    """

    def __init__(self, fleet: Fleet, control_plan: Callable[[str, SecureWork], RoundPlan], row_cap: float) -> None:
        self._fleet = fleet
        self._control_plan = control_plan
        self._row_cap = row_cap
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
        """One report, that of all devices' rows; none if the budget ended the round. Raises as `Fleet.run_round`."""
        for _ in range(ATTEMPTS):
            epoch = await self._ready(round, needed, deadline_s)
            use = self._next_use(epoch, lambda member: member.info.n_train if member.info else 0)
            weights = self._shares(use.peers)

            def masked_plan(device: str, use: SecureUse = use, shares: Mapping[str, float] = weights) -> RoundPlan:
                own = msgspec.structs.replace(use, share=shares[device])
                return msgspec.structs.replace(plan_for(device), secure=own)

            everybody = Cohort(use.peers, len(use.peers), len(use.peers))
            most = max(needed, epoch.threshold)
            reports = await self._fleet.run_round(
                round, masked_plan, most, deadline_s, kind, everybody, history, budget_s
            )
            if not reports:
                return []
            vectors = _vectors({report.device: report.result for report in reports})
            total = await self._unmask(epoch, use, vectors, round, deadline_s)
            if total is not None:
                return [_as_report(reports, plan_for(reports[0].device), total, use)]
            await self._fleet.withdraw(plan_for(reports[0].device).run, round)
        raise QuorumError(
            f"round {round}: devices dropped out before their masks could be removed, {ATTEMPTS} times"
            f"{self._fleet.missing()}; start the same run again to resume it",
            limit=needed,
        )

    # --- an evaluation -------------------------------------------------------------------------------------------

    async def evaluate(self, request: EvaluateRequest, timeout_s: float) -> dict[str, EvaluateReport]:
        """The evaluation over all devices' rows, as of the device `SUM`; empty: too few have such rows, or report."""
        for _ in range(ATTEMPTS):
            able = [member for member in self._fleet.live if member.n_rows(request)]
            if len(able) < FEWEST:
                log.warning("%d devices have %s rows, a secure sum needs %d", len(able), request.split, FEWEST)
                return {}
            try:
                epoch = await self._ready(self._fleet.round, FEWEST, timeout_s)
            except QuorumError as error:
                log.warning("secure evaluation left out: %s", error)
                return {}
            use = self._next_use(epoch, lambda member: member.n_rows(request))
            asked = msgspec.structs.replace(request, secure=use)
            found = await self._fleet.evaluate(asked, timeout_s, use.peers)
            masked = {name: report.masked for name, report in found.items() if report.masked is not msgspec.UNSET}
            if len(masked) < max(epoch.threshold, FEWEST - 1):
                return {}
            total = await self._unmask(epoch, use, _vectors(masked), self._fleet.round, timeout_s)
            if total is not None:
                report = evaluation_of(total, use, max(report.seconds for report in found.values()))
                check_evaluation(report, request)
                return {SUM: report}
        return {}

    # --- an epoch ------------------------------------------------------------------------------------------------

    async def _ready(self, round: int, needed: int, deadline_s: float) -> _Epoch:
        """An epoch with a sum left that all live devices are in."""
        epoch = self._epoch
        live = {member.name for member in self._fleet.live}
        if epoch is not None:
            epoch.gone |= set(epoch.sealed) - live
            if epoch.used < USES and live <= set(epoch.sealed) - epoch.gone and len(live) >= epoch.threshold:
                return epoch
        self._epoch = await self._begin(round, needed, deadline_s)
        return self._epoch

    async def _begin(self, round: int, needed: int, deadline_s: float) -> _Epoch:
        id = secrets.token_hex(16)
        n = max(needed, FEWEST)
        made = await self._exchange(round, lambda _: KeysWork(epoch=id, n_uses=USES), n, deadline_s)
        found = {name: result for name, result in made.items() if isinstance(result, KeysResult)}
        epoch = _Epoch(id, len(found) // 2 + 1, found)
        asked = SharesWork(epoch=id, threshold=epoch.threshold, names=epoch.names, keys=tuple(found.values()))
        told = await self._exchange(round, lambda _: asked, max(n, epoch.threshold), deadline_s, epoch.names)
        epoch.sealed = {name: result for name, result in told.items() if isinstance(result, SharesResult)}
        return epoch

    def _next_use(self, epoch: _Epoch, rows: Callable[..., int]) -> SecureUse:
        members = [member for member in self._fleet.live if member.name in epoch.sealed and rows(member)]
        epoch.used += 1
        return SecureUse(
            epoch=epoch.id,
            index=epoch.used - 1,
            peers=tuple(sorted(member.name for member in members)),
            largest=LARGEST_SKETCH * 1.01 * max(sum(rows(m) * (m.info.n_embd if m.info else 1) for m in members), 1),
        )

    def _shares(self, names: tuple[str, ...]) -> dict[str, float]:
        """Weight of a row of each device, so that none counts for more than `row_cap` times the median's rows."""
        infos = {name: self._fleet.members[name].info for name in names}
        rows = {name: max(info.n_train if info else 1, 1) for name, info in infos.items()}
        most = self._row_cap * statistics.median(rows.values()) if self._row_cap else math.inf
        return {name: min(1.0, most / n) for name, n in rows.items()}

    async def _unmask(
        self, epoch: _Epoch, use: SecureUse, masked: Mapping[str, Vector], round: int, deadline_s: float
    ) -> Vector | None:
        """The sum of the results ``masked``; None: too few devices revealed their shares."""
        survivors = tuple(masked)
        dropped = tuple(name for name in use.peers if name not in masked)
        named = (*survivors, *dropped)

        def work(device: str) -> UnmaskWork:
            sealed = tuple(epoch.share(name, device, use.index) for name in named)
            return UnmaskWork(epoch=epoch.id, index=use.index, survivors=survivors, dropped=dropped, sealed=sealed)

        try:
            told = await self._exchange(round, work, epoch.threshold, deadline_s, survivors)
        except QuorumError as error:
            log.warning("a secure sum is tried again: %s", error)
            return None
        revealed = {name: result.shares for name, result in told.items() if isinstance(result, UnmaskResult)}

        def add_up() -> Vector:
            found = {
                name: secret_of(epoch.names, {to: shares[place] for to, shares in revealed.items()}, epoch.threshold)
                for place, name in enumerate(named)
            }
            seeds = {name: found[name] for name in survivors}
            return unmasked(use, epoch.keys, masked, seeds, {name: found[name] for name in dropped})

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
        reports = await self._fleet.run_round(round, plan, min(needed, len(chosen)), deadline_s, "keys", cohort)
        return {report.device: report.result for report in reports}


def _vectors(results: Mapping[str, object]) -> dict[str, Vector]:
    """The masked vectors, which must have the same fields."""
    found = {
        name: from_bytes(result.fields, result.data)
        for name, result in sorted(results.items())
        if isinstance(result, MaskedResult)
    }
    layouts = {vector.fields for vector in found.values()}
    if len(layouts) != 1:
        raise WireError("devices sent masked results of different shapes: are all of one version?", field="fields")
    return found


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
