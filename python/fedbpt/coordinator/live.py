"""`LiveEvaluation`: the result as it would be if the search ended now, on the devices' development rows.

A result is a prompt with its readout, and the readout may account for most of the gain. So a readout is fitted to the
current mean, in the same way as at the end. These exchanges are not part of the run: they close no round, and decide
nothing, except that ``patience`` judges by the loss of the calibrated prompt without a readout, and that an interim
look may end the search.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbpt.aggregation.base import Fit
from fedbpt.coordinator.devices.fleet import Fleet
from fedbpt.coordinator.devices.members import Cohort
from fedbpt.coordinator.ledger import RunLedger
from fedbpt.coordinator.reports.round_reports import cap_reports, evaluation_loss, held_differences
from fedbpt.coordinator.reports.vetting import leave_out
from fedbpt.errors import InputError, QuorumError
from fedbpt.protocol.rounds import EvaluateReport, FitPurpose, RoundPlan, Work
from fedbpt.runs.dev_figures import DEV_SECONDS, FINAL, UNJUDGED, metrics_of, scores_of
from fedbpt.runs.events import Evaluated
from fedbpt.runs.result import BASELINES, NO_SCORE, AnyReadout, Score, Variants, variants

if TYPE_CHECKING:
    from fedbpt.coordinator.devices.secure_sums import SecureSums

log = logging.getLogger(__name__)

SUFFIX: Final = ".live"
"""Appended to the run's name in these exchanges, so that devices distinguish them from its rounds."""


class LiveEvaluation:
    """Evaluations of one session of a run.

    Args:
        ledger: the run's state and store.
        fleet: its devices.
        sums: runs exchanges and evaluations over them.
        deadline_s: returns the time limit of an exchange, and of an evaluation, seconds.
    """

    def __init__(
        self, ledger: RunLedger, fleet: Fleet, sums: Fleet | SecureSums, deadline_s: Callable[[], float]
    ) -> None:
        self._ledger = ledger
        self._fleet = fleet
        self._sums = sums
        self._deadline_s = deadline_s
        self._exchanges = 0
        self._shown: tuple[list[str], dict[str, EvaluateReport]] = ([], {})

    @property
    def scores(self) -> Mapping[str, Score]:
        """The latest scores by variant; with ``patience``, those of the best mean so far."""
        return scores_of(*self._shown)

    async def measure(self, round: int, final: bool = False, judges: bool = True) -> Evaluated | None:
        """Evaluate, store the figures with ``round``, and judge the mean; None: no device has rows, or reported.

        ``final``: the search is over, its readout fitted, and its mean judged. ``judges``: False where the mean is
        that of the last evaluation, and only the readout is new.
        """
        ledger = self._ledger
        if not any(member.info and member.info.n_dev for member in self._fleet.live):
            return None
        began = time.monotonic()
        found = ledger.state.variants() if final else await self._lines_now()
        reports = {} if found is None else ledger.state.trusted(await self._evaluate(found))
        if found is None or not reports:
            return None
        names = list(found)
        judged = evaluation_loss(
            list(reports.values()),
            ledger.settings.row_cap,
            names.index(_judged(names)),
            ledger.settings.check_devices,
        )
        improved = final or not judges or ledger.state.judge(judged)
        if improved or not ledger.settings.patience or not self._shown[1]:
            self._shown = names, reports
        figures = metrics_of(*self._shown, generates=not ledger.task.labels)
        figures |= {FINAL: 1.0} if final else {DEV_SECONDS: time.monotonic() - began}
        if not final:
            figures |= {"judged_loss": judged} if judges else {UNJUDGED: 1.0}
        ledger.store.record_metrics(ledger.run, round, figures)
        if not final:
            ledger.course.evaluated(ledger.state.searched, figures[DEV_SECONDS])
        scores = self.scores
        return Evaluated(
            round=round,
            score=scores["tuned"],
            devices=tuple(reports),
            zero_shot=scores.get("zero_shot", NO_SCORE),
            stages={name: score for name, score in scores.items() if name in BASELINES},
        )

    async def look(self) -> float | None:
        """What the search has gained over the readout without prompt, nats a held-out training row.

        None: the readout could not be fitted, or no device reported.
        """
        ledger = self._ledger
        state = ledger.state
        fit = await self._readout_fit(state.mean)
        lines = {} if fit is None else state.held_lines(fit)
        lines = {name: line for name, line in lines.items() if name != "calibrated"}  # it has no prompt either
        if len(lines) < 2:
            return None
        request = ledger.planner.request(lines, label_weights=state.label_weights, split="held")
        reports = list(state.trusted(await self._sums.evaluate(request, self._deadline_s())).values())
        if not reports:
            return None
        cap = ledger.settings.row_cap if ledger.settings.check_devices else None
        _, means, _ = held_differences(reports, cap)
        return -min(means[1:])

    async def _lines_now(self) -> Variants | None:
        """The variants as they would be if the search ended now; None: no readout is, or could be, fitted."""
        ledger = self._ledger
        state = ledger.state
        mean = state.aggregator.mean
        fits: dict[FitPurpose, AnyReadout] = {
            purpose: fit.readout for purpose, fit in ledger.state.fits.items() if purpose != "readout"
        }
        if "probe" in fits and state.reads_layers:  # what is shipped is at least as good, and a fit takes minutes
            return variants(mean, fits, shipped="probe")
        if state.only_reads:
            return None
        if ledger.state.searched and ledger.settings.objective.readout_words:
            readout = await self._readout(mean)
            if readout is None:
                return None
            fits["readout"] = readout
        return variants(mean, fits)

    async def _readout(self, mean: NDArray[np.float64]) -> AnyReadout | None:
        fit = await self._readout_fit(mean)
        return None if fit is None else fit.readout

    async def _readout_fit(self, mean: NDArray[np.float64]) -> Fit | None:
        fit = self._ledger.state.new_fit("readout", mean)
        try:
            while not fit.done:
                await self._exchange(fit)
        except (QuorumError, InputError) as error:  # the run goes on without the figure
            log.info("live evaluation left out: %s", error)
            return None
        return fit

    async def _exchange(self, fit: Fit) -> None:
        self._exchanges += 1
        ledger = self._ledger
        work = fit.work()
        left_out = ledger.state.left_out
        trusted = tuple(name for name in self._fleet.members if name not in left_out)
        reports = await self._sums.run_round(
            ledger.state.closed,
            lambda device: self._plan(device, work),
            fit.min_reports,
            self._deadline_s(),
            "readout",
            Cohort(trusted, len(trusted), len(trusted)) if left_out else None,
        )
        reports, _ = await asyncio.to_thread(leave_out, ledger.settings, fit, reports)
        fit.update(cap_reports(reports, ledger.settings.row_cap))

    def _plan(self, device: str, work: Work) -> RoundPlan:
        plan = self._ledger.planner.plan(self._exchanges, device, work)
        return msgspec.structs.replace(plan, run=f"{plan.run[: 128 - len(SUFFIX)]}{SUFFIX}")

    async def _evaluate(self, found: Variants) -> dict[str, EvaluateReport]:
        ledger = self._ledger
        request = ledger.planner.request(
            found, label_weights=ledger.state.label_weights, split="dev", max_rows=ledger.settings.dev_rows
        )
        return await self._sums.evaluate(request, self._deadline_s())


def _judged(names: list[str]) -> str:
    return "prompt" if "prompt" in names else "tuned"
