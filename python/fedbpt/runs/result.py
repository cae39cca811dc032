"""`RunResult`: what a run found, its scores, and the variants that they are of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbpt.protocol.rounds import DeviceInfo, EvaluateReport, FitPurpose
from fedbpt.protocol.specs import (
    Array,
    Message,
    Readout,
    Template,
)
from fedbpt.quantities import NaturalInt
from fedbpt.runs.intervals import wilson_interval
from fedbpt.runs.settings import RunSettings

_LARGEST_EXPONENT = 700.0  # e^700 is about the largest float


class Score(Message, frozen=True):
    """Counts of an evaluation, summed over devices."""

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
        """Mean over texts, nats."""
        return self.loss_sum / self.n if self.n else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the mean loss: of target texts' tokens, each text counting alike."""
        return perplexity(self.loss)

    def __add__(self, other: Score) -> Score:
        return Score(n=self.n + other.n, correct=self.correct + other.correct, loss_sum=self.loss_sum + other.loss_sum)

    @classmethod
    def of(cls, report: EvaluateReport, index: int) -> Score:
        """The counts of latent ``index`` in ``report``."""
        return cls(n=report.n, correct=report.correct[index], loss_sum=report.loss_sums[index])


def perplexity(loss: float) -> float:
    """exp of a mean negative log-likelihood in nats a token."""
    return math.exp(min(loss, _LARGEST_EXPONENT))


NO_SCORE = Score(n=0, correct=0, loss_sum=0.0)


BASELINES = {
    "calibrated": "calibration only",
    "probe": "linear probe",
    "prompt": "tuned, without readout",
}
"""What a result is compared with, besides zero-shot: the model with a bias per label, or with a readout, and no prompt;
the tuned prompt with a bias per label. By their keys, with their names for people."""


LINES = {"zero_shot": "zero-shot", **BASELINES, "tuned": "tuned"}
"""All that is compared, by key, with names for people, in the order in which it comes about."""

Split: TypeAlias = Literal["dev", "test"]

Lines: TypeAlias = dict[str, tuple[NDArray[np.float64], Readout | None]]


def lines(mean: NDArray[np.float64], fits: Mapping[FitPurpose, Readout]) -> Lines:
    """What a run compares, by name, as latent [d] and readout: ``zero_shot``, ``tuned`` and those of `BASELINES`."""
    zero, bias, readout = np.zeros_like(mean), fits.get("calibration"), fits.get("readout")
    found: Lines = {"zero_shot": (zero, None), "tuned": (mean, readout or bias)}
    if bias is not None:
        found["calibrated"] = (zero, bias)
    if "probe" in fits:
        found["probe"] = (zero, fits["probe"])
    if readout is not None:
        found["prompt"] = (mean, bias)
    return found


class TemplateScore(Message, frozen=True):
    """A template, and how the model does with it and no prompt on the training rows that chose among templates."""

    template: Template
    score: Score


class DeviceSummary(Message, frozen=True):
    """One device's share of a run. ``zero_shot`` and ``tuned`` have n = 0 where it missed the final evaluation.

    Bytes are of message bodies, polls and repetitions included, over all sittings.
    """

    name: str
    info: DeviceInfo | None
    reports: NaturalInt  # rounds in which its report was used
    bytes_up: NaturalInt
    bytes_down: NaturalInt
    peak_rss_bytes: NaturalInt
    zero_shot: Score
    tuned: Score


class RunResult(Message, frozen=True):
    """What a run found. ``mean`` [d] is the tuned latent; ``fits`` correct the label logits; ``digest``: the search's.

    ``rounds`` are the search's. ``baselines``: other ways, by name (`BASELINES`). They, ``zero_shot``, ``tuned`` were
    measured on the same held-back ``test`` rows, which chose nothing.
    ``dev``: the same by name, ``zero_shot`` and ``tuned`` too, on ``dev`` rows; empty: there were none.
    ``seconds``: of the closed rounds (tuning); ``total_seconds`` with connecting and evaluating, this sitting only.
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
    templates: tuple[TemplateScore, ...] = ()  # as `TemplateSelected.candidates`
    epsilon: float | None = None  # spent on a training row at most; None: the run was not private
    dev: dict[str, Score] = msgspec.field(default_factory=dict)

    @property
    def generates(self) -> bool:
        """Whether target texts were to be made likely: then perplexity is the figure, not accuracy."""
        return not self.template.label_words

    @property
    def latent(self) -> NDArray[np.float64]:
        """The tuned latent [d]."""
        return self.mean.numpy()

    @property
    def readout(self) -> Readout | None:
        """What corrects the tuned prompt's label logits."""
        return self.lines()["tuned"][1]

    def lines(self) -> Lines:
        """What was evaluated: see `lines`."""
        return lines(self.latent, self.fits)

    def scores(self, split: Split) -> dict[str, Score]:
        """What was measured on ``split`` rows, by the keys of `LINES` and in their order; empty: nothing was."""
        found = {"zero_shot": self.zero_shot, **self.baselines, "tuned": self.tuned} if split == "test" else self.dev
        return {name: found[name] for name in LINES if name in found and found[name].n}

    @property
    def bytes_up(self) -> int:
        return sum(device.bytes_up for device in self.devices)

    @property
    def bytes_down(self) -> int:
        return sum(device.bytes_down for device in self.devices)
