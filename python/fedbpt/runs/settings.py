"""`RunSettings`: everything that determines a run's outcome, and its budget."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

from fedbpt.aggregation.base import Aggregator
from fedbpt.aggregation.methods import SearchSettings, method_named
from fedbpt.aggregation.robust import Robust
from fedbpt.errors import ConfigError
from fedbpt.objective.privacy import epsilon, sampling_rate
from fedbpt.protocol import codec
from fedbpt.protocol.specs import CheckedMessage, Generation, ObjectiveSpec, PrivacySpec, PromptSpec
from fedbpt.quantities import Length, NaturalInt, PositiveFloat, PositiveInt

FIT_ROWS: Final = 512
"""Default of `RunSettings.fit_rows`."""

FIT_ROWS_A_LABEL: Final = 32
"""Rows of each label that the default of `RunSettings.fit_rows` is raised to, where labels are many."""


class RunSettings(CheckedMessage, frozen=True):
    """Everything that determines a run's outcome, and its budget: tuning ends at the first limit reached.

    ``rounds``, ``evaluations``, ``tokens`` and ``seconds`` are the limits, 0 for none; at least one must be set.
    Rounds and evaluations are those of the search; tokens are summed over devices; seconds are those of closed rounds,
    over all sessions of the run. Round 0, which selects the template, is not charged.

    ``method`` names the aggregator (`fedbpt.aggregation.methods`). ``quorum``: share of the run's devices that must
    report in a round; ``deadline_s``: longest duration of a round. If ``objective.readout_words`` > 0, a readout is
    fitted after the search.

    Raises `ConfigError` for settings that are invalid or contradict each other.
    """

    rounds: NaturalInt = 40
    evaluations: NaturalInt = 0
    tokens: NaturalInt = 0
    seconds: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    method: str = "pooled"
    prompt: PromptSpec = PromptSpec()
    objective: ObjectiveSpec = ObjectiveSpec()
    select_rows: NaturalInt = 32  # maximum training rows per device for the template selection; 0: all
    # Maximum training rows per device for calibration and readout; 0: all. FIT_ROWS: also FIT_ROWS_A_LABEL for each.
    fit_rows: NaturalInt = FIT_ROWS
    calibrate: bool = True  # fit a bias per label before the search
    balanced: bool = False  # weight losses so that labels count equally; devices then send their label counts
    ensemble: PositiveInt = 2  # number of templates, the best of the selection, that the readout averages over
    # What it reads: hidden states, by sums ("layers"; "auto": where it can) or by gradients; or words.
    # "means": by noisy sums, as "auto" in private runs.
    readout: Literal["auto", "layers", "logistic", "words", "means"] = "auto"
    baselines: bool = False  # also evaluate a readout without prompt; always, where it reads hidden states
    popsize: Length = 20
    iterations: PositiveInt = 8
    seed: NaturalInt = 0
    robust: Robust = "none"  # Byzantine-robust rule that replaces the mean over devices
    byzantine: PositiveInt = 1  # number of Byzantine devices tolerated; unused without a robust rule
    # A device's weight is at most this multiple of the median device's number of rows; 0: no cap.
    row_cap: Annotated[float, msgspec.Meta(ge=0)] = 2.0
    # Bound what one device decides, and leave out one whose sums make others' rows worse; not in secure runs.
    check_devices: bool = True
    privacy: PrivacySpec | None = None  # clipping and noise on the devices; None: off
    secure: bool = False  # the coordinator learns sums over devices only (docs/secure.md)
    quorum: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    deadline_s: PositiveFloat = 600.0
    # A device is waited for up to this multiple of its usual time; 0: until the deadline.
    stragglers: Annotated[float, msgspec.Meta(ge=0)] = 4.0
    per_round: NaturalInt = 0  # number of reports that complete a round of the search; 0: one of every device
    # How these are drawn: by a hash that devices check; or in a random order, as by versions before.
    draft: Literal["hash", "permutation"] = "hash"
    over_selection: Annotated[float, msgspec.Meta(ge=0)] = 0.25  # share of additional devices in case some are slow
    even_rounds: bool = False  # slow devices score smaller mini-batches, so that all finish at about the same time
    evaluate_every: NaturalInt = 20  # rounds between evaluations on dev rows, if devices have any; 0: never
    patience: NaturalInt = 0  # evaluations without a lower loss that end the search at its best mean; 0: never
    restarts: NaturalInt = 0  # maximum number of restarts, each from the best mean, when patience runs out
    # End the search after a quarter or half of its budget where held-out rows show no gain over the probe.
    stop_if_futile: bool = True
    # For target texts: share of the budget, its last part, that searches on the metric of the model's own answers.
    metric_share: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    dev_rows: NaturalInt = 100  # maximum rows per device in evaluations on dev rows; 0: all
    test_rows: NaturalInt = 0  # maximum rows per device in the final evaluation; 0: all

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.rounds or self.evaluations or self.tokens or self.seconds):
            raise ConfigError("a run needs a limit: set rounds, evaluations, tokens or seconds", field="rounds")
        if self.patience and not self.evaluate_every:
            raise ConfigError(
                "patience needs evaluations on dev rows: give dev rows, and set evaluate_every", field="evaluate_every"
            )
        if self.restarts and not self.patience:
            raise ConfigError("restarts need patience: set patience, or restarts = 0", field="patience")
        method_named(self.method).check_robust(self.robust)
        if 0 < self.row_cap < 1:
            raise ConfigError(
                f"row_cap must be 1 or more, or 0 for no cap, got {self.row_cap:g}", field="row_cap", limit=1
            )
        if self.robust != "none" and (self.patience or self.balanced):
            raise ConfigError(
                f"robust = {self.robust!r} excludes patience and balanced, which trust every device: set patience = 0 "
                "and balanced = false",
                field="robust",
            )
        self._check_secure()
        objective = self.objective
        if self.metric_share and self.patience:
            raise ConfigError(
                "patience judges by likelihood, which the search on a metric leaves: set patience or metric_share to 0",
                field="metric_share",
            )
        if self.metric_share and (self.prompt.in_front or self.privacy is not None or objective.perturb):
            raise ConfigError(
                "metric_share needs many answers at a time, and their metric: set placement 'layers' or 'cue', no "
                "privacy and objective.perturb = 0",
                field="metric_share",
            )
        if (objective.generation is not UNSET) > (self.metric_share > 0):
            raise ConfigError("objective.generation is set by a run with a metric_share: set that", field="generation")
        if self.prompt.shifts and self.privacy is not None:
            raise ConfigError(
                f"placement {self.prompt.placement!r} needs the size of rows' hidden states, which privacy does not "
                "protect: use placement = 'cue'",
                field="placement",
            )
        if self.reads_privately and (self.readout not in ("auto", "means") or self.robust != "none"):
            field = "robust" if self.robust != "none" else "readout"
            raise ConfigError(
                "privacy protects a readout only by noisy sums: set readout = 'means' and robust = 'none'; or "
                "objective.readout_words = 0 and calibrate = false for a private search without a readout",
                field=field,
            )
        if self.readout == "means" and not self.reads_privately:
            raise ConfigError(
                "readout = 'means' is for private runs: set [settings.privacy], and objective.readout_words above 0",
                field="readout",
            )
        if self.readout == "layers" and not self.may_read_layers:
            raise ConfigError(
                "readout = 'layers' pools sums, which trusts every device and reveals its rows' states: set robust = "
                "'none' and no privacy, and keep calibrate and objective.readout_words; or set readout = 'logistic' or "
                "'words'",
                field="readout",
            )
        if self.readout == "logistic" and not self.may_read_layers:
            raise ConfigError(
                "readout = 'logistic' sends gradients, which privacy does not protect: set no privacy, and keep "
                "calibrate and objective.readout_words; or set readout = 'words'",
                field="readout",
            )
        fits = self.calibrate and not self.reads_privately
        unprotected = fits or self.balanced or objective.perturb
        if self.privacy is not None and (unprotected or not method_named(self.method).private):
            raise ConfigError(
                "privacy protects noisy sums for a readout, or losses of candidates: set method = pooled or fedavg, "
                "balanced = false and objective.perturb = 0, and without a readout (objective.readout_words = 0) "
                "calibrate = false",
                field="privacy",
            )

    def _check_secure(self) -> None:
        """A secure run sees sums over all devices, no single report."""
        if not self.secure:
            return
        needed = {
            "method": "pooled",
            "robust": "none",
            "privacy": None,
            "per_round": 0,
            "even_rounds": False,
            "metric_share": 0.0,
        }
        if self.reads_privately:  # whose ε does not depend on a device's rows
            needed.pop("privacy")
        for field, value in needed.items():
            if getattr(self, field) != value:
                raise ConfigError(
                    f"secure = true sees no single report, which another {field} than {value!r} needs: leave it out",
                    field=field,
                )

    def for_labels(self, labels: Sequence[str], generation: Generation | UnsetType = UNSET) -> RunSettings:
        """These settings adapted to a task: without ``labels``, only the prompt is tuned, by the loss ``nll``.

        With many labels, the default ``fit_rows`` is raised to `FIT_ROWS_A_LABEL` for each.
        ``generation``: of the task.

        Raises `ConfigError` if the loss does not fit a task with labels, or ``metric_share`` one without a metric.
        """
        if self.metric_share and generation is UNSET:
            raise ConfigError(
                "metric_share is for tasks with a metric of answers: give the task a [generation], or set 0",
                field="metric_share",
            )
        if labels and self.objective.loss == "nll":
            raise ConfigError(
                "the loss nll is for tasks of target texts, but this task has labels: use cross_entropy or hinge",
                field="loss",
            )
        if labels:
            many = self.fit_rows == FIT_ROWS and FIT_ROWS_A_LABEL * len(labels) > FIT_ROWS
            return msgspec.structs.replace(self, fit_rows=FIT_ROWS_A_LABEL * len(labels)) if many else self
        measured = generation if self.metric_share else UNSET
        objective = msgspec.structs.replace(self.objective, loss="nll", readout_words=0, generation=measured)
        readout: Literal["auto", "words"] = "words" if self.readout == "words" else "auto"
        return msgspec.structs.replace(
            self, objective=objective, calibrate=False, baselines=False, balanced=False, readout=readout
        )

    @property
    def may_read_layers(self) -> bool:
        """Whether readouts may be fitted to hidden states."""
        trusted = self.robust == "none" or self.readout == "logistic"
        fits = self.calibrate and self.objective.readout_words > 0
        return self.reads_privately or (self.readout != "words" and trusted and self.privacy is None and fits)

    @property
    def reads_privately(self) -> bool:
        """Whether a readout is made from noisy sums, and nothing else: no template is selected, no prompt tuned."""
        return self.privacy is not None and self.objective.readout_words > 0 and self.objective.loss != "nll"

    @property
    def _readout_read(self) -> str:
        if self.judges_targets:
            return "auto"
        if not self.may_read_layers:
            return "words"
        if self.reads_privately:
            return "means"
        return "logistic" if self.readout == "logistic" else "auto"

    @property
    def judges_targets(self) -> bool:
        """For target texts: whether training rows are held out to judge the prompt.

        Not if devices may lie or losses are private, and not with ``readout`` words, as in runs of before.
        """
        is_open = self.robust == "none" and self.privacy is None
        return self.objective.loss == "nll" and self.readout != "words" and is_open

    def continuing(self, begun: RunSettings) -> RunSettings:
        """These settings for a run that was begun with ``begun``, maybe by a version with other defaults.

        It draws devices as that run did. ``auto`` reads words, the default ``fit_rows`` is that of few labels, and
        devices are not checked, where that run did, had it and did not.
        """
        began_with_words = self.readout == "auto" and begun.readout == "words"
        raised = self.fit_rows > FIT_ROWS == begun.fit_rows and self.fit_rows % FIT_ROWS_A_LABEL == 0
        return msgspec.structs.replace(
            self,
            readout="words" if began_with_words else self.readout,
            check_devices=self.check_devices and begun.check_devices,
            fit_rows=FIT_ROWS if raised else self.fit_rows,
            draft=begun.draft,
        )

    def aggregator(self) -> Aggregator:
        """A new aggregator of ``method``."""
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

    def epsilon(self, n_templates: int, n_rows: int, rounds: int, readouts: int = 0) -> float | None:
        """ε spent on a row of a device with ``n_rows`` by selecting among ``n_templates`` and ``rounds`` of search.

        ``readouts``: noisy sums for a readout, in a run that makes one. None without privacy or rows.
        """
        if self.privacy is None or not n_rows:
            return None
        if self.reads_privately:
            return epsilon(self.privacy, [], readouts)
        searches = rounds * (self.iterations if method_named(self.method).local else 1)
        select, search = (sampling_rate(n_rows, size) for size in (self.select_rows, self.objective.batch_size))
        return epsilon(self.privacy, [(select, int(n_templates > 1)), (search, searches)])

    def identity(self) -> str:
        """Digest of the settings that must be equal for a run to be resumed: see `fixed`."""
        return hashlib.sha256(msgspec.msgpack.encode(self.fixed())).hexdigest()[:32]

    def fixed(self) -> dict[str, Any]:
        """The settings that must be equal for a run to be resumed.

        The budget may change, and ``stop_if_futile``. So may ``patience`` without restarts; with restarts, it is part
        of the search.
        """
        fixed = msgspec.structs.replace(
            self,
            rounds=1,
            evaluations=0,
            tokens=0,
            seconds=0.0,
            quorum=1.0,
            deadline_s=1.0,
            dev_rows=0,
            test_rows=0,
            stragglers=0.0,
            per_round=0,
            over_selection=0.0,
            evaluate_every=1 if self.restarts else 0,
            patience=self.patience if self.restarts else 0,
            readout=self._readout_read,
        )
        # The fields of versions that had no readouts of hidden states or no looks, so that their runs can be resumed.
        left_out = {"stop_if_futile", "draft"} | (set() if self.metric_share else {"metric_share"})
        left_out |= set() if self.secure else {"secure"}
        left_out |= set() if self.check_devices else {"check_devices"}
        left_out |= set() if self.may_read_layers or self.judges_targets else {"readout"}
        received = codec.decode(codec.encode(fixed), RunSettings)
        return {name: getattr(received, name) for name in received.__struct_fields__ if name not in left_out}


def stored_settings(body: bytes) -> RunSettings:
    """The settings of a stored run, from its wire bytes. Raises `WireError`.

    Versions that stored no ``readout`` had that of words only; those that stored no ``draft`` drew a random order, and
    those without ``check_devices`` checked none.
    """
    settings = codec.decode(body, RunSettings)
    stored = msgspec.msgpack.decode(body)
    return msgspec.structs.replace(
        settings,
        readout=settings.readout if "readout" in stored else "words",
        draft=settings.draft if "draft" in stored else "permutation",
        check_devices=settings.check_devices and "check_devices" in stored,
    )
