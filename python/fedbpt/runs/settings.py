"""What goes into a federated run and what comes out: `RunSettings`, the events, `RunResult`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbpt.aggregation.base import Aggregator
from fedbpt.aggregation.methods import SearchSettings, method_named
from fedbpt.aggregation.robust import Robust
from fedbpt.errors import ConfigError
from fedbpt.objective.privacy import epsilon, sampling_rate
from fedbpt.protocol import codec
from fedbpt.protocol.messages import (
    Array,
    CheckedMessage,
    DeviceInfo,
    EvaluateReport,
    FitPurpose,
    Message,
    ObjectiveSpec,
    PrivacySpec,
    PromptSpec,
    Readout,
    Template,
)
from fedbpt.quantities import Length, NaturalInt, PositiveFloat, PositiveInt
from fedbpt.runs.intervals import wilson_interval

_LARGEST_EXPONENT = 700.0  # e^700 is about the largest float

RoundPurpose: TypeAlias = Literal["selection", "calibration", "probe", "search", "readout"]
RunStage: TypeAlias = RoundPurpose | Literal["evaluation"]


class RunSettings(CheckedMessage, frozen=True):
    """All that decides a run's outcome, and its budget: tuning ends at the first limit that is reached.

    ``rounds``, ``evaluations``, ``tokens`` and ``seconds`` are limits, 0 for none; at least one must be set.
    Rounds and evaluations are the search's; tokens are summed over devices; seconds are of closed rounds, over all
    sittings. Round 0, which chooses the template, is not charged. ``objective.readout_words`` > 0: after the search, a
    readout is fitted.
    ``quorum`` is the share of the run's devices that must report in a round; ``deadline_s`` the longest
    that a round may take. ``method`` names the aggregator (`fedbpt.aggregation.methods`).
    """

    rounds: NaturalInt = 40
    evaluations: NaturalInt = 0
    tokens: NaturalInt = 0
    seconds: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    method: str = "pooled"
    prompt: PromptSpec = PromptSpec()
    objective: ObjectiveSpec = ObjectiveSpec()
    select_rows: NaturalInt = 32  # most training rows per device that choose the template; 0: all
    fit_rows: NaturalInt = 512  # most training rows per device that calibrate and fit the readout; 0: all
    calibrate: bool = True  # fit a bias per label before the search
    balanced: bool = False  # weigh losses so that every label counts alike; devices then send their label counts
    ensemble: PositiveInt = 2  # so many templates, the best by the selection, does the readout average over
    baselines: bool = False  # fit and evaluate a linear probe on the model without prompt, too
    popsize: Length = 20
    iterations: PositiveInt = 8
    seed: NaturalInt = 0
    robust: Robust = "none"  # what takes the place of the devices' mean, so that some of them may lie
    byzantine: PositiveInt = 1  # so many, where it is robust
    row_cap: Annotated[float, msgspec.Meta(ge=0)] = 2.0  # times the devices' median rows that one counts for; 0: any
    privacy: PrivacySpec | None = None  # clip and noise on the devices; None: losses as they are
    quorum: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    deadline_s: PositiveFloat = 600.0
    stragglers: Annotated[float, msgspec.Meta(ge=0)] = (
        4.0  # times its usual time that a device is waited for; 0: always
    )
    per_round: NaturalInt = 0  # reports that make a round of the search; 0: of all devices
    over_selection: Annotated[float, msgspec.Meta(ge=0)] = 0.25  # share of those asked besides, for some are slow
    even_rounds: bool = False  # slow devices score smaller mini-batches, so that all end a round together
    evaluate_every: NaturalInt = 20  # rounds between live evaluations, where devices have ``dev`` rows; 0: none
    patience: NaturalInt = 0  # so many of those without a lower loss end the search, and the best mean counts; 0: never
    restarts: NaturalInt = 0  # so often the search begins anew from the best mean instead
    dev_rows: NaturalInt = 100  # most rows per device in those; 0: all
    test_rows: NaturalInt = 0  # most rows per device in the final evaluation; 0: all

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.rounds or self.evaluations or self.tokens or self.seconds):
            raise ConfigError("a run needs a limit: set rounds, evaluations, tokens or seconds")
        if self.patience and not self.evaluate_every:
            raise ConfigError("patience needs evaluations on dev rows: give dev rows, and set evaluate_every")
        if self.restarts and not self.patience:
            raise ConfigError("restarts come when patience runs out: set patience, or restarts = 0")
        method_named(self.method).check_robust(self.robust)
        if 0 < self.row_cap < 1:
            raise ConfigError(f"row_cap = {self.row_cap:g} would cut the median device: give 1 or more, or 0: no cap")
        if self.robust != "none" and (self.patience or self.balanced):
            raise ConfigError(
                f"robust = {self.robust!r} cannot go with patience or balanced: devices that lie on dev rows or label "
                "counts would decide; set patience = 0 and balanced = false"
            )
        objective = self.objective
        told = self.calibrate or self.balanced or objective.readout_words or objective.perturb
        if self.privacy is not None and (told or not method_named(self.method).private):
            raise ConfigError(
                "privacy is for losses of candidates alone: set method = pooled or fedavg, calibrate = false, "
                "balanced = false, objective.readout_words = 0 and objective.perturb = 0"
            )

    def for_labels(self, labels: Sequence[str]) -> RunSettings:
        """These settings, for a task with ``labels``: with none, what there is to fit is the prompt alone.

        Raises `ConfigError` where the loss does not go with them.
        """
        if labels and self.objective.loss == "nll":
            raise ConfigError("loss nll is for tasks of target texts, this one has labels: use cross_entropy or hinge")
        if labels:
            return self
        objective = msgspec.structs.replace(self.objective, loss="nll", readout_words=0)
        return msgspec.structs.replace(self, objective=objective, calibrate=False, baselines=False, balanced=False)

    def aggregator(self) -> Aggregator:
        """The aggregator of ``method``, before its first round."""
        return method_named(self.method).make(
            SearchSettings(
                d=self.prompt.d,
                sigma0=self.prompt.sigma0,
                popsize=self.popsize,
                iterations=self.iterations,
                seed=self.seed,
                robust=self.robust,
                byzantine=self.byzantine,
            )
        )

    def epsilon(self, n_templates: int, n_rows: int, rounds: int) -> float | None:
        """ε of a selection among ``n_templates`` and ``rounds`` of search, on a row of a device that has ``n_rows``;
        None: without privacy, or rows.
        """
        if self.privacy is None or not n_rows:
            return None
        searches = rounds * (self.iterations if method_named(self.method).local else 1)
        select, search = (sampling_rate(n_rows, size) for size in (self.select_rows, self.objective.batch_size))
        return epsilon(self.privacy, [(select, int(n_templates > 1)), (search, searches)])

    def identity(self) -> str:
        """Digest of what a run must have in common to be resumed; the budget may change, and patience without restarts,
        which it makes a part of the search."""
        fixed = msgspec.structs.replace(
            self, rounds=1, evaluations=0, tokens=0, seconds=0.0, quorum=1.0, deadline_s=1.0, dev_rows=0, test_rows=0,
            stragglers=0.0, per_round=0, over_selection=0.0,
            evaluate_every=1 if self.restarts else 0, patience=self.patience if self.restarts else 0,
        )  # fmt: skip
        return codec.digest(fixed)


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


# --- events ----------------------------------------------------------------------------------------------------------


class RunStarted(Message, frozen=True, tag=True):
    """``resumed``: number of closed rounds taken from the store, ``searched`` of them of the search; ``devices``: all;
    ``live``: those that answered.
    """

    run: str
    devices: tuple[str, ...]
    live: tuple[str, ...]
    model_name: str
    model_fingerprint: str
    resumed: NaturalInt
    settings: RunSettings
    searched: NaturalInt = 0


class StageBegan(Message, frozen=True, tag=True):
    """The run is at ``stage`` from now on."""

    stage: RunStage


class TemplateSelected(Message, frozen=True, tag=True):
    """``losses``: mean loss of each candidate on the training rows, nats; empty where there was nothing to select.

    ``candidates``: their scores; empty too where nobody counts right answers: of target texts, in a private run.
    """

    template: Template
    index: NaturalInt
    losses: tuple[float, ...]
    candidates: tuple[TemplateScore, ...] = ()


class Progressed(Message, frozen=True, tag=True):
    """A device that is at work said where it stands. ``paused``: why its work waits; empty: it does not."""

    device: str
    round: NaturalInt
    done: NaturalInt
    total: NaturalInt
    paused: str = ""


class RoundClosed(Message, frozen=True, tag=True):
    """Totals are since the run began; ``loss`` is the round's mean over candidates, weighted by rows, nats.

    ``searched``: rounds of the search so far. ``epsilon``: spent so far, at the settings' δ; None: not private.
    ``share``: of the budget that is spent, 0 to 1; ``eta_s``: seconds until the result; None: nobody knows.
    """

    round: NaturalInt
    purpose: RoundPurpose
    searched: NaturalInt
    reported: tuple[str, ...]
    missing: tuple[str, ...]
    loss: float
    evaluations: NaturalInt
    tokens: NaturalInt
    seconds: float
    bytes_up: NaturalInt
    bytes_down: NaturalInt
    epsilon: float | None = None
    share: float = 0.0
    eta_s: float | None = None


class Evaluated(Message, frozen=True, tag=True):
    """What would be shipped if the search ended after ``round``, on ``dev`` rows; round 0 is zero-shot.

    ``zero_shot`` and ``stages``, by their keys in `BASELINES`, are of the same rows.
    """

    round: NaturalInt
    score: Score
    devices: tuple[str, ...]
    zero_shot: Score = NO_SCORE
    stages: dict[str, Score] = msgspec.field(default_factory=dict)


class DeviceLost(Message, frozen=True, tag=True):
    """``device`` does not count in ``round`` (any more), and why. It is looked for until it answers."""

    device: str
    round: NaturalInt
    reason: str


class DeviceBack(Message, frozen=True, tag=True):
    """``device`` answers again and takes part from ``round`` on."""

    device: str
    round: NaturalInt


class LateReport(Message, frozen=True, tag=True):
    """A report came after its round had closed: recorded, not used."""

    device: str
    round: NaturalInt


class Steered(Message, frozen=True, tag=True):
    """Somebody paused or resumed the run, or changed its deadline (seconds): so it is from now on."""

    paused: bool
    deadline_s: float


class RunFinished(Message, frozen=True, tag=True):
    result: RunResult


Event: TypeAlias = (
    RunStarted
    | StageBegan
    | TemplateSelected
    | Progressed
    | RoundClosed
    | Evaluated
    | DeviceLost
    | DeviceBack
    | LateReport
    | Steered
    | RunFinished
)
EventCallback: TypeAlias = Callable[[Event], None]
