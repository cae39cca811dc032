"""`RunState`: the state of a run, a function of its closed rounds and of its losses on development rows.

`fedbpt.coordinator.planner` plans the next round from it, `fedbpt.coordinator.ledger` stores rounds and replays them.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias, cast

import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from fedbpt.aggregation.base import Aggregator, Fit, devices_of
from fedbpt.aggregation.layer_fit import LayerFit
from fedbpt.aggregation.logistic_fit import LogisticFit, max_views
from fedbpt.aggregation.means_fit import MeansFit
from fedbpt.aggregation.readout import ReadoutFit
from fedbpt.coordinator.layer_reading import only_reads, reads_layers, states_alone, within_message
from fedbpt.coordinator.reports.round_reports import (
    cap_reports,
    held_differences,
    label_weights,
    level_reports,
    purpose_of,
    template_losses,
    template_rewards,
    template_scores,
)
from fedbpt.engine.layers import logistic_layer, middle_layer, reading_layers
from fedbpt.errors import InputError
from fedbpt.objective.objective import answer_loss
from fedbpt.protocol.rounds import EvaluateReport, FitPurpose, HeldRows, Reading, RoundReport
from fedbpt.protocol.specs import Array, LayerReadout, PrivacySpec, Readout, Shift, Template
from fedbpt.runs.events import RoundPurpose
from fedbpt.runs.result import NO_SCORE, AnyReadout, Shipped, TemplateScore, Variants, variants
from fedbpt.runs.settings import RunSettings
from fedbpt.secure.sizes import sketch_rank
from fedbpt.tasks import Task
from fedbpt.tasks.reading import LONG_TEXT, reading_templates

SELECTION: Final = 0
"""Number of the round that selects the template; calibration and search begin with round 1."""


AnyLayerFit: TypeAlias = LayerFit | LogisticFit | MeansFit

FEWEST_JUDGES: Final = 5  # rows

MISLEADS: Final = "left out of the readout and of what follows: others' rows are predicted worse with its sums"
CONTRADICTS: Final = "left out of the readout and of what follows: its losses contradict its sums"

LONG_PATTERN: Final = 200
"""Length in bytes from which a pattern is taken to hold examples, whose tokens are not those of a text."""

_Z: Final = 1.645  # the normal distribution's quantile of 95 %


class RunState:
    """Changes by `apply`, for each closed round in order, and by `judge` and `look`; nothing else decides what follows.

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
        self.left_out: set[str] = set()
        """Devices that are not asked any more (`fedbpt.coordinator.reports.vetting.leave_out`)."""
        self.label_weights: tuple[float, ...] = ()
        """Weight of a row's loss by its label; empty: ones."""
        self.n_layer = 0
        """Layers of the model whose states can be read; set when the run is opened."""
        self.n_embd = 0
        """Size of these states; 0: unknown."""
        self.shipped: Shipped = ""
        """The variant that `choose` chose."""
        self.prompt = settings.prompt
        """With its ``shift``, if it has one, once the selection is closed."""
        self._selected = 0
        self._long_texts = False  # unknown without a selection
        self._best: tuple[float, NDArray[np.float64]] | None = None  # lowest judged loss, and its mean
        self._n_worse = 0  # judgements since the best one, or since the last restart
        self._restarts = 0
        self.looks = 0
        """How many of the interim looks are done or missed, see `look`."""
        self.futile_at: int | None = None
        """`searched` when one of them showed no gain; None: none did."""

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
            bound = self.settings.check_devices and self.settings.robust == "none"
            self.aggregator.update(level_reports(counted) if bound else counted)
            self.searched += 1
            self.fits.pop("readout", None)
        else:
            fit = self.fit(purpose)
            fit.update(reports if isinstance(fit, MeansFit) else counted)  # a cap would scale the noise too
            self.fits[purpose] = fit
        self._close(round, reports)

    def _select(self, reports: Sequence[RoundReport], counted: Sequence[RoundReport]) -> None:
        self.label_weights = label_weights(reports, self.settings.row_cap)
        losses = template_losses(
            counted, self.label_weights, self.settings.robust != "none", self.settings.check_devices
        )
        n_answered, rewards = template_rewards(reports)
        by_metric = n_answered >= FEWEST_JUDGES
        self._selected = int(np.argmin(answer_loss(rewards / n_answered, losses) if by_metric else losses))
        n_texts = sum(report.n_texts for report in reports)
        examples = sum(max(len(each.pattern.encode()) - LONG_PATTERN, 0) // 4 for each in self.task.templates)
        self._long_texts = sum(report.tokens for report in reports) > (LONG_TEXT + examples) * n_texts
        self.template_losses = tuple(losses.tolist())
        if self.settings.prompt.shifts:
            self.prompt = self.settings.prompt.shifting(self._shift(reports))
        scores = template_scores(reports, self.template_losses) if len(self.task.templates) > 1 else ()
        self.candidates = tuple(
            TemplateScore(template=template, score=score)
            for template, score in zip(self.task.templates, scores, strict=False)
        )
        if by_metric and rewards.any():
            self.candidates = tuple(
                TemplateScore(
                    template=template, score=NO_SCORE, reward=float(total / n_answered), n_answered=n_answered
                )
                for template, total in zip(self.task.templates, rewards, strict=True)
            )

    def _shift(self, reports: Sequence[RoundReport]) -> Shift:
        """The layers to shift, and their sizes under the selected template: the median of the devices'."""
        found = []
        for report in reports:
            sizes = getattr(report.result, "sizes", UNSET)
            if sizes is UNSET or sizes.shape != (len(self.task.templates), self.n_layer):
                raise InputError(
                    f"device {report.device} gives no sizes of {self.n_layer} layers: update it", field="sizes"
                )
            found.append(sizes.numpy()[self._selected])
        median = np.median(found, axis=0)
        one = self.settings.prompt.placement == "layer"
        layers = (middle_layer(self.n_layer),) if one else tuple(range(self.n_layer))
        return Shift(layers=layers, sizes=tuple(float(median[layer]) for layer in layers))

    def _close(self, round: int, reports: Sequence[RoundReport]) -> None:
        self.closed = round
        for report in reports:
            self.n_reports.update(devices_of(report))

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

    def look(self, gain: float, looks: int) -> None:
        """Record an interim look, after which `looks` are done: what the search gains on held-out rows, nats a row.

        A look never chooses what is shipped, it only ends the search: `choose` judges the mean as it is then.
        """
        self.looks = looks
        if gain <= 0.0 and self.futile_at is None:
            self.futile_at = self.searched

    def choose(self, names: Sequence[str], reports: Sequence[EvaluateReport]) -> None:
        """Choose what is shipped, by losses of `held_lines` ``names`` on held-out rows; without any, the first line.

        Another line is chosen if its loss is lower with 95 % confidence (Student's t, one-sided): few rows judge, and
        a line that fits them by chance can be far worse than the readout without prompt.
        """
        bounds = [mean + margin for _, mean, margin in self._held_losses(len(names), reports)]
        best = int(np.argmin([0.0, *bounds[1:]])) if bounds else 0
        self.shipped = cast(Shipped, names[best])

    def choose_texts(self, likelihoods: Sequence[EvaluateReport], answers: Sequence[EvaluateReport] = ()) -> None:
        """Choose whether the prompt of target texts is shipped, by the last of two lines' losses on held-out rows.

        It is if it is better with 95 % confidence: by the metric of ``answers`` or, where they are worth more, but not
        surely, by ``likelihoods``: a few answers seldom show a gain by themselves. Without ``answers`` likelihood alone
        decides. Fewer than `FEWEST_JUDGES` rows only veto: the prompt is shipped unless it is worse on them.
        """
        none = [(0, 0.0, 0.0)]
        n_rows, loss, margin = (self._held_losses(2, likelihoods) or none)[-1]
        better = loss + margin < 0.0 if n_rows >= FEWEST_JUDGES else loss <= 0.0
        n_answers, loss, margin = (self._held_losses(2, answers) or none)[-1]
        if n_answers >= FEWEST_JUDGES:
            better = loss + margin < 0.0 or (better and loss < 0.0)
        self.shipped = "" if better else "zero_shot"

    def _held_losses(self, n_lines: int, reports: Sequence[EvaluateReport]) -> list[tuple[int, float, float]]:
        """Of each line: held rows, its mean loss less that of the first line, and what to add for 95 % confidence."""
        settings = self.settings
        n_rows, means, variances = held_differences(reports, settings.row_cap if settings.check_devices else None)
        found = []
        for i in range(n_lines) if reports else ():
            error = math.sqrt(variances[i] / (n_rows - 1)) if n_rows > 1 else math.inf
            quantile = _Z + (_Z**3 + _Z) / (4 * max(n_rows - 1, 1))  # to first order in 1/n
            found.append((n_rows, means[i], quantile * error))
        return found

    def choose_unjudged(self) -> None:
        """Choose where nothing can judge: the readout without prompt if none was fitted with it, else the usual."""
        done = {purpose for purpose, fit in self.fits.items() if isinstance(fit, AnyLayerFit) and fit.done}
        self.shipped = "probe" if "probe" in done and "readout" not in done else ""

    # --- readings ------------------------------------------------------------------------------------------------

    @property
    def template(self) -> Template:
        """The selected template; before the selection, the first."""
        return self.task.templates[self._selected]

    @property
    def template_index(self) -> int:
        return self._selected

    @property
    def reads_layers(self) -> bool:
        """Whether readouts are fitted to hidden states; else to the logits of random words."""
        return reads_layers(self.task.templates, self.settings, self.n_layer)

    @property
    def states_alone(self) -> bool:
        """Whether the label words are too long to be scored: only hidden states are read, and no prompt is tuned."""
        return states_alone(self.task.templates, self.settings, self.n_layer)

    @property
    def only_reads(self) -> bool:
        """Whether the run only makes a readout: no template is selected, no prompt tuned."""
        return only_reads(self.task.templates, self.settings, self.n_layer)

    @property
    def holds_rows(self) -> bool:
        """Whether the search leaves out the rows of `held`, as they judge what is shipped."""
        if not self.task.labels:
            return self.settings.judges_targets
        return self.settings.robust == "none" and isinstance(self.fits.get("probe"), LayerFit | LogisticFit)

    @property
    def judges_answers(self) -> bool:
        """Whether what is shipped is judged by the task's metric of the model's own answers, not by likelihood."""
        return self.task.generation is not UNSET and not self.prompt.in_front

    @property
    def selects_by_answers(self) -> bool:
        """Whether devices that can are to measure answers to select the template: in a sum, all would have to."""
        settings = self.settings
        return self.judges_answers and not settings.secure and settings.privacy is None and settings.robust == "none"

    @property
    def held(self) -> HeldRows:
        """The training rows that judge what is shipped."""
        return HeldRows(max_rows=self.settings.fit_rows, seed=self.settings.seed)

    def held_lines(self, readout: Fit | None = None) -> Variants:
        """What may be shipped, as far as it can be judged on held-out rows: readouts are fitted without them.

        ``readout``: in the place of the one in `fits`.
        """
        if not self.task.labels and self.holds_rows and self.mean.any():
            found = variants(self.mean, {})
            return {"zero_shot": found["zero_shot"], "prompt": found["tuned"]}
        held: dict[FitPurpose, LayerReadout] = {}
        fits = self.fits if readout is None else {**self.fits, "readout": readout}
        for purpose, fit in fits.items():
            if isinstance(fit, LayerFit | LogisticFit) and fit.done and (own := fit.held_readout) is not None:
                held[purpose] = own
        if "probe" not in held:
            return {}
        found = variants(self.mean, {**self._readouts(), **held})
        return {name: found[name] for name in ("probe", "calibrated", "prompt", "read") if name in found}

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
        readout = self.readout("calibration")
        return readout.weights.numpy()[0] if isinstance(readout, Readout) else None

    def fit(self, purpose: FitPurpose) -> Fit:
        """The fit of ``purpose`` as far as it has come; a new one before its first exchange, or after more search."""
        if purpose in self.fits:
            return self.fits[purpose]
        return self.new_fit(purpose, self.mean if purpose == "readout" else np.zeros_like(self.mean))

    def new_fit(self, purpose: FitPurpose, latent: NDArray[np.float64]) -> Fit:
        """A fit of ``purpose`` to the prompt of ``latent`` [d]; not part of the state."""
        if purpose != "calibration" and self.reads_layers:
            if self.settings.reads_privately:
                return self._new_means_fit(purpose, self.settings.privacy)
            by_gradients = self.settings.readout == "logistic"
            return self._new_logistic_fit(purpose, latent) if by_gradients else self._new_layer_fit(purpose, latent)
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

    def _new_layer_fit(self, purpose: FitPurpose, latent: NDArray[np.float64]) -> LayerFit:
        base = self.fits.get("probe") if purpose == "readout" else None
        templates = (
            () if purpose == "readout" else reading_templates(self.task.templates, self.template, self._long_texts)
        )
        n_labels = len(self.task.labels)
        layers, n_views = within_message(
            reading_layers(self.n_layer), 1 + len(templates), n_labels, self.n_embd, self.settings.secure
        )
        templates = templates[: n_views - 1]
        n_task_templates = 1 if purpose == "readout" else min(len(self.task.templates), n_views)
        reading = Reading(
            latent=Array.of(latent),
            templates=templates,
            layers=base.reading.layers if isinstance(base, LayerFit) else layers,
            n_embd=self.n_embd,
            n_word_views=0 if self.states_alone else n_task_templates,
            max_rows=self.settings.fit_rows,
        )
        return LayerFit(
            purpose,
            reading,
            n_labels,
            self.settings.balanced,
            base if isinstance(base, LayerFit) and base.done else None,
            self.template,
            sketch_rank(reading.n_readers, reading.n_folds, n_labels, self.n_embd) if self.settings.secure else 0,
            self.settings.seed,
            bound=self.settings.check_devices,
        )

    def _new_means_fit(self, purpose: FitPurpose, privacy: PrivacySpec | None) -> MeansFit:
        if privacy is None:
            raise InputError("noisy sums need the size of their noise: set [settings.privacy]", field="privacy")
        n_labels = len(self.task.labels)
        templates = reading_templates(self.task.templates, self.template, self._long_texts)
        layers, n_views = within_message(reading_layers(self.n_layer), 1 + len(templates), n_labels, self.n_embd)
        reading = Reading(
            latent=Array.of(np.zeros_like(self.mean)),
            templates=templates[: n_views - 1],
            layers=layers,
            n_embd=self.n_embd,
            n_word_views=0 if self.states_alone else min(len(self.task.templates), n_views),
            max_rows=self.settings.fit_rows,
        )
        return MeansFit(purpose, reading, n_labels, privacy.noise_of_readout, self.settings.secure)

    def _new_logistic_fit(self, purpose: FitPurpose, latent: NDArray[np.float64]) -> LogisticFit:
        n_labels = len(self.task.labels)
        templates = reading_templates(self.task.templates, self.template, self._long_texts)
        templates = templates[: max_views(n_labels, self.n_embd) - 1]
        reading = Reading(
            latent=Array.of(latent),
            templates=templates,
            layers=(logistic_layer(self.n_layer),),
            n_embd=self.n_embd,
            n_word_views=0 if self.states_alone else min(len(self.task.templates), 1 + len(templates)),
            max_rows=self.settings.fit_rows,
        )
        robust = self.settings.robust
        judged = robust == "none"  # which is shipped is chosen by sums of the devices' losses, which trusts them
        return LogisticFit(purpose, reading, n_labels, judged, robust, self.settings.byzantine)

    def readout(self, purpose: FitPurpose) -> AnyReadout | None:
        """The result of the fit of ``purpose``; None: there is none."""
        return self.fits[purpose].readout if purpose in self.fits else None

    def variants(self) -> Variants:
        """The variants to evaluate at the end."""
        return variants(self.mean, self._readouts(), self.shipped)

    def _readouts(self) -> dict[FitPurpose, AnyReadout]:
        return {purpose: fit.readout for purpose, fit in self.fits.items()}

    def trusted(self, reports: Mapping[str, EvaluateReport]) -> dict[str, EvaluateReport]:
        """``reports`` by device, without those of devices that are left out."""
        return {device: report for device, report in reports.items() if device not in self.left_out}

    def digest(self) -> str:
        """sha256 (hex) of everything that decides what comes next."""
        fits = [f"|{purpose}|{fit.digest()}" for purpose, fit in self.fits.items()]
        weights = [f"|{weight.hex()}" for weight in self.label_weights]
        shift = [] if self.prompt.shift is UNSET else [f"|{size.hex()}" for size in self.prompt.shift.sizes]
        return hashlib.sha256("".join([self.aggregator.digest(), *fits, *weights, *shift]).encode()).hexdigest()
