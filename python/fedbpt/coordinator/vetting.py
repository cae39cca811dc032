"""Whether a round's reports may be committed: what comes next must be a plan that devices accept.

`fedbpt.coordinator.report_checks` bounds each report, and aggregation keeps its state in bounds. Should reports that
pass still add up to nonsense, the one that does it is left out; a round that is committed cannot be taken back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedbpt.coordinator.ledger import RunLedger
from fedbpt.coordinator.report_checks import purpose_of
from fedbpt.errors import FedbptError, FederationError
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import LocalWork, PooledWork, RoundPlan, RoundReport
from fedbpt.search.population import transform


def vet(ledger: RunLedger, round: int, reports: Sequence[RoundReport]) -> tuple[list[RoundReport], dict[str, str]]:
    """The ``reports`` that may close ``round``, and of the others, by device, why not. ``ledger`` stays as it is.

    Raises `FederationError` where no single device is to blame.
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
    """Why no device would accept what follows from ``reports``; empty: they would."""
    purpose = purpose_of(reports)
    try:
        twin = ledger.twin()
        with np.errstate(all="ignore"):  # what overflows is found below
            twin.apply(round, reports)
            work = twin.work(round + 1, "search" if purpose == "selection" else purpose)
            plan = twin.plan(round + 1, reports[0].device, work)
            codec.decode(codec.encode(plan), RoundPlan)
            if isinstance(work, PooledWork | LocalWork):
                transform(work.state, np.zeros((1, plan.prompt.d)))
    except (FedbptError, ArithmeticError, ValueError) as error:
        return str(error)
    return ""
