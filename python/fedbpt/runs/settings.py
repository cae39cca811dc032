"""`RunSettings`: all that decides a run's outcome, and its budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from fedbpt.aggregation.base import Aggregator
from fedbpt.aggregation.methods import SearchSettings, method_named
from fedbpt.aggregation.robust import Robust
from fedbpt.errors import ConfigError
from fedbpt.objective.privacy import epsilon, sampling_rate
from fedbpt.protocol import codec
from fedbpt.protocol.specs import (
    CheckedMessage,
    ObjectiveSpec,
    PrivacySpec,
    PromptSpec,
)
from fedbpt.quantities import Length, NaturalInt, PositiveFloat, PositiveInt


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
