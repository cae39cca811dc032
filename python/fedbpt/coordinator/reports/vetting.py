"""Which of a round's reports may be committed.

Sums of hidden states that mislead, and losses that contradict them, are left out (`leave_out`). The plan that follows
must be one that devices accept.

`report_checks` bounds each report, and aggregation bounds its state. If reports within these bounds still lead to an
impossible plan, the report that causes it is left out: a committed round cannot be undone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedbpt.aggregation.base import Fit
from fedbpt.aggregation.cross_check import DeviceSums, misleading
from fedbpt.aggregation.layer_fit import LayerFit, sums_of
from fedbpt.coordinator.ledger import RunLedger
from fedbpt.coordinator.reports.round_reports import cap_reports, purpose_of
from fedbpt.coordinator.run_state import CONTRADICTS, MISLEADS
from fedbpt.coordinator.work_kinds import kind_of
from fedbpt.errors import FedbptError, FederationError
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import RoundPlan, RoundReport, SumsResult
from fedbpt.runs.settings import RunSettings


def leave_out(
    settings: RunSettings, fit: Fit | None, reports: Sequence[RoundReport]
) -> tuple[list[RoundReport], dict[str, str]]:
    """The ``reports`` that may be used, and by device why the others are left out, at most a third of them.

    Sums of hidden states that mislead, and losses that contradict them, see `fedbpt.aggregation.cross_check`.
    ``fit``: the begun fit of the round; None: another round.
    """
    found: dict[str, str] = {}
    if not settings.check_devices or not reports:
        return list(reports), found
    results = [report.result for report in reports if isinstance(report.result, SumsResult)]
    if len(results) == len(reports):
        capped = cap_reports(reports, settings.row_cap)
        devices = [
            DeviceSums(sums_of(result), report.n_texts / max(sum(map(sum, result.counts)), 1))
            for report, result in zip(capped, results, strict=True)
        ]
        found = {reports[place].device: MISLEADS for place in misleading(devices)}
    elif isinstance(fit, LayerFit):
        found = dict.fromkeys(fit.contradicting(reports), CONTRADICTS)
    if len(found) > len(reports) // 3:
        return list(reports), {}
    return [report for report in reports if report.device not in found], found


def vet(ledger: RunLedger, round: int, reports: Sequence[RoundReport]) -> tuple[list[RoundReport], dict[str, str]]:
    """The ``reports`` that may close ``round``, and by device why the others may not. ``ledger`` is not changed.

    Raises:
        FederationError: leaving out any one report does not help.
    """
    problem = _problem(ledger, round, reports)
    if not problem:
        return list(reports), {}
    for report in reports:
        others = [other for other in reports if other is not report]
        if others and not _problem(ledger, round, others):
            return others, {report.device: f"its report makes a plan that no device accepts: {problem}"}
    raise FederationError(
        f"the reports of round {round} make a plan that no device accepts ({problem}): the round is not committed;"
        " start the same run again to resume it"
    )


def _problem(ledger: RunLedger, round: int, reports: Sequence[RoundReport]) -> str:
    """Why no device would accept the plan that follows from ``reports``; empty: they would."""
    purpose = purpose_of(reports)
    try:
        state = ledger.state.copy()
        planner = ledger.planner.for_state(state)
        with np.errstate(all="ignore"):  # what overflows is found below
            state.apply(round, reports)
            work = planner.work(round + 1, "search" if purpose == "selection" else purpose)
            plan = planner.plan(round + 1, reports[0].device, work)
            codec.decode(codec.encode(plan), RoundPlan)
            kind_of(work).check_work(plan, work)
    except (FedbptError, ArithmeticError, ValueError) as error:
        return str(error)
    return ""
