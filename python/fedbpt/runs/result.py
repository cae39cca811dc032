"""`RunResult`: the outcome of a run, and the variants whose scores it holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbpt.prompts.variants import BASELINES as BASELINES
from fedbpt.prompts.variants import FUTILE as FUTILE
from fedbpt.prompts.variants import NOT_BETTER as NOT_BETTER
from fedbpt.prompts.variants import UNSCORED as UNSCORED
from fedbpt.prompts.variants import VARIANTS as VARIANTS
from fedbpt.protocol.rounds import DeviceInfo, EvaluateReport, FitPurpose
from fedbpt.protocol.specs import Array, LayerReadout, Message, PromptSpec, Readout, Shift, Template
from fedbpt.quantities import NaturalInt
from fedbpt.runs.intervals import wilson_interval
from fedbpt.runs.settings import RunSettings

_MAX_EXPONENT = 700.0  # e^709 is the largest float


class Score(Message, frozen=True):
    """Sums of an evaluation over devices. Means of no rows are NaN."""

    n: NaturalInt
    correct: NaturalInt
    loss_sum: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy (`fedbpt.runs.intervals.wilson_interval`)."""
        return wilson_interval(self.correct, self.n)

    @property
    def loss(self) -> float:
        """Mean loss over texts, nats."""
        return self.loss_sum / self.n if self.n else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the mean loss, in which every text has the same weight."""
        return perplexity(self.loss)

    def __add__(self, other: Score) -> Score:
        return Score(n=self.n + other.n, correct=self.correct + other.correct, loss_sum=self.loss_sum + other.loss_sum)

    @classmethod
    def of(cls, report: EvaluateReport, index: int) -> Score:
        """The sums of latent ``index`` in ``report``."""
        return cls(n=report.n, correct=report.correct[index], loss_sum=report.loss_sums[index])


def perplexity(loss: float) -> float:
    """exp of ``loss``, a mean negative log-likelihood in nats per token."""
    return math.exp(min(loss, _MAX_EXPONENT))


NO_SCORE = Score(n=0, correct=0, loss_sum=0.0)


class AnswerScore(Message, frozen=True):
    """Sums over devices of what the model's own answers are worth by the task's metric. Means of no rows are NaN.

    ``n``: answers; ``reward_sum``: of the metric's values, 0 to 1; ``n_failed``: answers that the metric failed on;
    ``n_distinct``: different answers, counted on each device.
    """

    n: NaturalInt
    reward_sum: float
    n_failed: NaturalInt
    n_distinct: NaturalInt

    @property
    def mean(self) -> float:
        """Mean value of the metric."""
        return self.reward_sum / self.n if self.n else math.nan

    @property
    def distinct(self) -> float:
        """Share of different answers: near 0 where the model ignores the text."""
        return self.n_distinct / self.n if self.n else math.nan

    def __add__(self, other: AnswerScore) -> AnswerScore:
        return AnswerScore(
            n=self.n + other.n,
            reward_sum=self.reward_sum + other.reward_sum,
            n_failed=self.n_failed + other.n_failed,
            n_distinct=self.n_distinct + other.n_distinct,
        )

    @classmethod
    def of(cls, report: EvaluateReport, index: int) -> AnswerScore:
        """The sums of latent ``index`` in ``report``, of answers."""
        return cls(
            n=report.n,
            reward_sum=report.n - report.loss_sums[index],
            n_failed=report.n_failed[index] if report.n_failed else 0,
            n_distinct=report.n_distinct[index] if report.n_distinct else 0,
        )


NO_ANSWERS = AnswerScore(n=0, reward_sum=0.0, n_failed=0, n_distinct=0)

Split: TypeAlias = Literal["dev", "test"]

AnyReadout: TypeAlias = Readout | LayerReadout

Variants: TypeAlias = dict[str, tuple[NDArray[np.float64], AnyReadout | None]]

Shipped: TypeAlias = Literal["", "zero_shot", "calibrated", "probe", "prompt", "read"]
"""The variant that held-out training rows chose to ship; empty: it is the prompt, with its readout if it has one.

For target texts ``zero_shot``, if these rows do not show that the prompt is better.
"""


def variants(mean: NDArray[np.float64], fits: Mapping[FitPurpose, AnyReadout], shipped: Shipped = "") -> Variants:
    """The variants that a run compares, by key of `VARIANTS`, each a latent [d] and a readout.

    With a probe from states alone and no fitted bias, the label words were never scored: there is no zero-shot.
    """
    zero = np.zeros_like(mean)
    bias = fits.get("calibration")
    probe = fits.get("probe")
    readout = fits.get("readout")
    of_layers = isinstance(probe, LayerReadout)
    scored = not isinstance(probe, LayerReadout) or probe.word_scales.numpy().any()
    found: Variants = {"zero_shot": (zero, None)} if bias is not None or scored else {}
    found["tuned"] = (mean, readout or bias)
    if bias is not None:
        found["calibrated"] = (zero, bias)
    if probe is not None:
        found["probe"] = (zero, probe)
    if readout is not None or (of_layers and mean.any()) or shipped == "zero_shot":
        found["prompt"] = (mean, bias)
    if isinstance(readout, LayerReadout):
        found["read"] = (mean, readout)
    if shipped:
        found["tuned"] = found[shipped]
    return found


class TemplateScore(Message, frozen=True):
    """A template and its score without a prompt, on the training rows that selected the template.

    ``reward``: of a task with a metric of generated answers, its mean value over ``n_answered`` rows, in the place of
    ``score``.
    """

    template: Template
    score: Score
    reward: float | None = None
    n_answered: NaturalInt = 0


class DeviceSummary(Message, frozen=True):
    """One device's part in a run. ``zero_shot`` and ``tuned`` have n = 0 if it missed the final evaluation.

    Bytes are of message bodies, including polls and repetitions, over all sessions of the run.
    """

    name: str
    info: DeviceInfo | None
    reports: NaturalInt  # number of rounds in which its report was used
    bytes_up: NaturalInt
    bytes_down: NaturalInt
    peak_rss_bytes: NaturalInt
    zero_shot: Score
    tuned: Score


class RunResult(Message, frozen=True):
    """The outcome of a run. ``mean`` [d]: the tuned latent; ``fits``: corrections of the label logits, ``layer_fits``:
    readouts of the label logits from hidden states; ``shipped``: which of the variants ``tuned`` is.

    ``digest``: of the search's final state. ``rounds``: those of the search. ``zero_shot``, ``tuned`` and ``baselines``
    (keys of `BASELINES`) were measured on the same held-out ``test`` rows, on which no decision was based. ``dev``: all
    of these by key of `VARIANTS`, on ``dev`` rows; empty: there were none. ``seconds``: of the closed rounds (tuning);
    ``total_seconds``: of this session, including connecting and evaluating.
    """

    run: str
    task: str
    settings: RunSettings
    model_fingerprint: str
    model_name: str
    template: Template
    mean: Array
    digest: str
    rounds: NaturalInt
    evaluations: NaturalInt
    tokens: NaturalInt
    seconds: float
    total_seconds: float
    zero_shot: Score
    tuned: Score
    baselines: dict[str, Score]
    fits: dict[FitPurpose, Readout]
    devices: tuple[DeviceSummary, ...]
    others: tuple[Template, ...] = ()  # the templates of the readout's ``others``
    templates: tuple[TemplateScore, ...] = ()  # see `TemplateSelected.candidates`
    epsilon: float | None = None  # most that was spent on a training row; None: the run was not private
    dev: dict[str, Score] = msgspec.field(default_factory=dict)
    layer_fits: dict[FitPurpose, LayerReadout] = msgspec.field(default_factory=dict)
    shipped: Shipped = ""
    shift: Shift | None = None  # of the prompt, if it shifts layers
    # By ``metric`` of the task and key of `VARIANTS`, on the first ``test`` rows of each device; empty: not measured.
    answers: dict[str, AnswerScore] = msgspec.field(default_factory=dict)
    metric: str = ""
    futile: bool = False  # the search ended before its budget, as held-out rows showed no gain over the probe

    @property
    def prompt(self) -> PromptSpec:
        """How ``mean`` becomes a prompt."""
        return self.settings.prompt if self.shift is None else self.settings.prompt.shifting(self.shift)

    @property
    def generates(self) -> bool:
        """Whether the task has target texts; its figure is then perplexity, not accuracy."""
        return not self.template.label_words

    @property
    def is_not_better(self) -> bool:
        """Whether the tuned prompt was not better than none, so that the model is shipped without one."""
        return self.shipped == "zero_shot"

    @property
    def is_unscored(self) -> bool:
        """Whether the label words were too long to be scored, so that there is no zero-shot figure."""
        return "zero_shot" not in self.variants()

    @property
    def latent(self) -> NDArray[np.float64]:
        """The latent [d] that is shipped; 0: no prompt."""
        return self.variants()["tuned"][0]

    @property
    def readout(self) -> AnyReadout | None:
        """How the label logits of what is shipped are read."""
        return self.variants()["tuned"][1]

    def variants(self) -> Variants:
        """The evaluated variants, see the function `variants`."""
        return variants(self.mean.numpy(), {**self.fits, **self.layer_fits}, self.shipped)

    def scores(self, split: Split) -> dict[str, Score]:
        """The scores on ``split`` rows by key of `VARIANTS`, in that order; empty: nothing was measured."""
        found = {"zero_shot": self.zero_shot, **self.baselines, "tuned": self.tuned} if split == "test" else self.dev
        return {name: found[name] for name in VARIANTS if name in found and found[name].n}

    def answer_scores(self) -> dict[str, AnswerScore]:
        """What the model's own answers are worth, by key of `VARIANTS`, in that order; empty: not measured."""
        return {name: self.answers[name] for name in VARIANTS if name in self.answers and self.answers[name].n}

    @property
    def bytes_up(self) -> int:
        return sum(device.bytes_up for device in self.devices)

    @property
    def bytes_down(self) -> int:
        return sum(device.bytes_down for device in self.devices)
