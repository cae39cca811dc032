"""`RunState`: the state of a run, a function of its closed rounds and of its losses on development rows.

`fedbpt.coordinator.planner` plans the next round from it, `fedbpt.coordinator.ledger` stores rounds and replays them.
"""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedbpt.aggregation.base import Aggregator, Fit
from fedbpt.aggregation.readout import ReadoutFit
from fedbpt.coordinator.round_reports import cap_reports, label_weights, purpose_of, template_losses, template_scores
from fedbpt.protocol.rounds import FitPurpose, RoundReport
from fedbpt.protocol.specs import Readout, Template
from fedbpt.runs.events import RoundPurpose
from fedbpt.runs.result import TemplateScore, Variants, variants
from fedbpt.runs.settings import RunSettings
from fedbpt.tasks import Task

SELECTION: Final = 0
"""Number of the round that selects the template; calibration and search begin with round 1."""


class RunState:
    """Changes by `apply`, for each closed round in order, and by `judge`; nothing else decides what comes next.

    Args:
        task, settings: of the run; constant.
        aggregator: fresh from ``settings``.
    """

    def __init__(self, task: Task, settings: RunSettings, aggregator: Aggregator) -> None:
        self.task = task
        self.settings = settings
        self.aggregator = aggregator
        self.closed = -1
        """Number of the last closed round."""
        self.searched = 0
        """Closed rounds of the search."""
        self.judged = 0
        """`searched` when the search's mean was last judged on development rows."""
        self.fits: dict[FitPurpose, Fit] = {}
        """Fits with at least one exchange."""
        self.n_reports: Counter[str] = Counter()
        """Reports that counted, by device."""
        self.template_losses: tuple[float, ...] = ()
        self.candidates: tuple[TemplateScore, ...] = ()
        self.label_weights: tuple[float, ...] = ()
        """Weight of a row's loss by its label; empty: ones."""
        self._selected = 0
        self._best: tuple[float, NDArray[np.float64]] | None = None  # lowest judged loss, and its mean
        self._n_worse = 0  # judgements since the best one, or since the last restart
        self._restarts = 0

    def copy(self) -> RunState:
        """An independent state, to try out what `apply` leads to."""
        constant = {id(each): each for each in (self.task, self.settings)}
        return copy.deepcopy(self, constant)

    # --- changes -------------------------------------------------------------------------------------------------

    def apply(self, round: int, reports: Sequence[RoundReport]) -> None:
        """Close ``round``. Raises `InputError` for reports that do not fit."""
        purpose = purpose_of(reports)
        counted = cap_reports(reports, self.settings.row_cap)
        if purpose == "selection":
            self._select(reports, counted)
        elif purpose == "search":
            self.aggregator.update(counted)
            self.searched += 1
            self.fits.pop("readout", None)
        else:
            fit = self.fit(purpose)
            fit.update(counted)
            self.fits[purpose] = fit
        self._close(round, reports)

    def _select(self, reports: Sequence[RoundReport], counted: Sequence[RoundReport]) -> None:
        self.label_weights = label_weights(reports, self.settings.row_cap)
        losses = template_losses(counted, self.label_weights, self.settings.robust != "none")
        self._selected = int(np.argmin(losses))
        self.template_losses = tuple(losses.tolist())
        scores = template_scores(reports, self.template_losses) if len(self.task.templates) > 1 else ()
        self.candidates = tuple(
            TemplateScore(template=template, score=score)
            for template, score in zip(self.task.templates, scores, strict=False)
        )

    def _close(self, round: int, reports: Sequence[RoundReport]) -> None:
        self.closed = round
        self.n_reports.update(report.device for report in reports)

    def skip_selection(self) -> None:
        """Close the selection without a round: there is one template."""
        self.closed = max(self.closed, SELECTION)

    def discard_readout(self, round: int, reports: Sequence[RoundReport]) -> None:
        """Close ``round`` without its result, and fit the readout anew: it was fitted to another mean."""
        self.fits.pop("readout", None)
        self._close(round, reports)

    def abandon_fits(self, keep: RoundPurpose | None = None) -> None:
        """Drop unfinished fits, except for ``keep``: a budget in seconds ended before they were done."""
        self.fits = {purpose: fit for purpose, fit in self.fits.items() if fit.done or purpose == keep}

    def judge(self, loss: float) -> bool:
        """Record ``loss``, in nats, of the search's mean on development rows; returns whether it is the lowest so far.

        May restart the search from the best mean.
        """
        self.judged = self.searched
        better = self._best is None or loss < self._best[0]
        if better:
            self._best = (loss, self.aggregator.mean)
            self._n_worse = 0
        else:
            self._n_worse += 1
        if self.out_of_patience and self._restarts < self.settings.restarts:
            self._restarts += 1
            self._n_worse = 0
            self.aggregator.restart(self.mean)
        return better

    # --- readings ------------------------------------------------------------------------------------------------

    @property
    def template(self) -> Template:
        """The selected template; before the selection, the first."""
        return self.task.templates[self._selected]

    @property
    def template_index(self) -> int:
        return self._selected

    @property
    def others(self) -> tuple[Template, ...]:
        """The templates whose readouts are averaged with the selected one's: the next best by the selection's loss."""
        if not self.settings.objective.readout_words:
            return ()
        ranked = np.argsort(self.template_losses, kind="stable")  # empty without a selection
        return tuple(self.task.templates[i] for i in ranked[1 : self.settings.ensemble])

    @property
    def mean(self) -> NDArray[np.float64]:
        """The latent [d] to ship: the search's mean or, with ``patience``, the best judged one."""
        return self._best[1] if self.settings.patience and self._best is not None else self.aggregator.mean

    @property
    def out_of_patience(self) -> bool:
        """Whether the last ``patience`` judgements were no better than the best one; never with ``patience`` 0."""
        return bool(self.settings.patience) and self._n_worse >= self.settings.patience

    @property
    def label_bias(self) -> NDArray[np.float64] | None:
        """The calibrated bias [n_labels]; None: not calibrated."""
        fit = self.fits.get("calibration")
        return None if fit is None else fit.readout.weights.numpy()[0]

    def fit(self, purpose: FitPurpose) -> Fit:
        """The fit of ``purpose`` as far as it has come; a new one before its first exchange, or after more search."""
        if purpose in self.fits:
            return self.fits[purpose]
        return self.new_fit(purpose, self.mean if purpose == "readout" else np.zeros_like(self.mean))

    def new_fit(self, purpose: FitPurpose, latent: NDArray[np.float64]) -> Fit:
        """A fit of ``purpose`` to the prompt of ``latent`` [d]; not part of the state."""
        others = self.others if purpose == "readout" else ()
        n_words = 0 if purpose == "calibration" else self.settings.objective.readout_words // (1 + len(others))
        return ReadoutFit(
            purpose,
            latent,
            n_words,
            len(self.task.labels),
            self.label_bias,
            self.settings.fit_rows,
            others,
            self.settings.robust,
            self.settings.byzantine,
        )

    def readout(self, purpose: FitPurpose) -> Readout | None:
        """The result of the fit of ``purpose``; None: there is none."""
        return self.fits[purpose].readout if purpose in self.fits else None

    def variants(self) -> Variants:
        """The variants to evaluate at the end."""
        return variants(self.mean, {purpose: fit.readout for purpose, fit in self.fits.items()})

    def digest(self) -> str:
        """sha256 (hex) of everything that decides what comes next."""
        fits = [f"|{purpose}|{fit.digest()}" for purpose, fit in self.fits.items()]
        weights = [f"|{weight.hex()}" for weight in self.label_weights]
        return hashlib.sha256("".join([self.aggregator.digest(), *fits, *weights]).encode()).hexdigest()
