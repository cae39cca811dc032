"""What would be shipped if the search ended now, measured on the devices' development rows.

A result is the prompt with its readout, and most of what is gained may be the readout's. So one is fitted to the
search's mean as it stands, in the very way in which the last one will be. These exchanges are no part of the run: they
close no round, and nothing of an evaluation decides what comes next, but for the loss by which ``patience`` judges,
which is the calibrated prompt's without a readout.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbpt.aggregation.readout import ReadoutFit
from fedbpt.coordinator.fleet import Fleet
from fedbpt.coordinator.ledger import RunLedger
from fedbpt.coordinator.report_checks import cap_reports, evaluation_loss
from fedbpt.errors import InputError, QuorumError
from fedbpt.protocol.rounds import EvaluateReport, FitPurpose, FitWork, RoundPlan
from fedbpt.protocol.specs import Readout
from fedbpt.runs.dev_figures import DEV_SECONDS, FINAL, metrics_of, scores_of
from fedbpt.runs.events import Evaluated
from fedbpt.runs.result import BASELINES, Score, Variants, variants

log = logging.getLogger(__name__)

SUFFIX: Final = ".live"
"""Of the run's name in the exchanges, so that devices keep them apart from its rounds."""


class LiveEvaluation:
    """Evaluations of one sitting of a run.

    Args:
        ledger: the run's state.
        fleet: its devices.
        deadline_s: asked how long an exchange, or an evaluation, may take.
    """

    def __init__(self, ledger: RunLedger, fleet: Fleet, deadline_s: Callable[[], float]) -> None:
        self._ledger, self._fleet, self._deadline_s = ledger, fleet, deadline_s
        self._exchanges = 0
        self._shown: tuple[list[str], dict[str, EvaluateReport]] = ([], {})

    @property
    def scores(self) -> Mapping[str, Score]:
        """The latest, by line: of what would be shipped, which with ``patience`` is the best so far."""
        return scores_of(*self._shown)

    async def measure(self, round: int, final: bool = False) -> Evaluated | None:
        """Evaluate, write the figures to ``round``, and let ``patience`` judge; None: nobody had rows, or answered.

        ``final``: the search is over, its readout fitted, and its mean judged.
        """
        ledger = self._ledger
        if not any(member.info and member.info.n_dev for member in self._fleet.live):
            return None
        began = time.monotonic()
        found = ledger.variants() if final else await self._lines_now()
        reports = {} if found is None else await self._evaluate(found)
        if found is None or not reports:
            return None
        names = list(found)
        judged = evaluation_loss(list(reports.values()), ledger.settings.row_cap, names.index(_judged(names)))
        improved = final or ledger.judge(judged)
        if improved or not ledger.settings.patience or not self._shown[1]:
            self._shown = names, reports
        figures = metrics_of(*self._shown, generates=not ledger.task.labels)
        figures |= {FINAL: 1.0} if final else {"judged_loss": judged, DEV_SECONDS: time.monotonic() - began}
        ledger.store.record_metrics(ledger.run, round, figures)
        if not final:
            ledger.course.evaluated(ledger.searched, figures[DEV_SECONDS])
        scores = self.scores
        return Evaluated(
            round=round,
            score=scores["tuned"],
            devices=tuple(reports),
            zero_shot=scores["zero_shot"],
            stages={name: score for name, score in scores.items() if name in BASELINES},
        )

    async def _lines_now(self) -> Variants | None:
        """What would be compared if the search ended now; None: no readout could be fitted."""
        ledger = self._ledger
        mean = ledger.aggregator.mean
        fits: dict[FitPurpose, Readout] = {
            purpose: fit.readout for purpose, fit in ledger.fits.items() if purpose != "readout"
        }
        if ledger.searched and ledger.settings.objective.readout_words:
            readout = await self._readout(mean)
            if readout is None:
                return None
            fits["readout"] = readout
        return variants(mean, fits)

    async def _readout(self, mean: NDArray[np.float64]) -> Readout | None:
        fit = self._ledger.new_fit("readout", mean)
        try:
            while not fit.done:
                await self._exchange(fit)
        except (QuorumError, InputError) as error:  # the run itself may do without
            log.info("the live figure is left out this time: %s", error)
            return None
        return fit.readout

    async def _exchange(self, fit: ReadoutFit) -> None:
        self._exchanges += 1
        work, ledger = fit.work(), self._ledger
        reports = await self._fleet.run_round(
            ledger.closed, lambda device: self._plan(device, work), fit.min_reports, self._deadline_s(), "readout"
        )
        fit.update(cap_reports(reports, ledger.settings.row_cap))

    def _plan(self, device: str, work: FitWork) -> RoundPlan:
        plan = self._ledger.plan(self._exchanges, device, work)
        return msgspec.structs.replace(plan, run=f"{plan.run[: 128 - len(SUFFIX)]}{SUFFIX}")

    async def _evaluate(self, found: Variants) -> dict[str, EvaluateReport]:
        ledger = self._ledger
        latents = np.stack([latent for latent, _ in found.values()])
        request = ledger.request(
            latents,
            readouts=tuple(readout for _, readout in found.values()),
            label_weights=ledger.label_weights,
            split="dev",
            max_rows=ledger.settings.dev_rows,
        )
        return await self._fleet.evaluate(request, self._deadline_s())


def _judged(names: list[str]) -> str:
    return "prompt" if "prompt" in names else "tuned"
