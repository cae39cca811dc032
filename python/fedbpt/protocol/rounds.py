"""What the coordinator and a device exchange in a round: plans, reports, evaluations (design: ``docs/federation.md``).

Plain data only, see `fedbpt.protocol.specs`. Nothing here knows HTTP, the model or the search.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

from fedbpt import quantities
from fedbpt.protocol.specs import (
    Array,
    Digest,
    Fingerprint,
    Message,
    Name,
    ObjectiveSpec,
    PrivacySpec,
    PromptSpec,
    Readout,
    Template,
)
from fedbpt.protocol.task_identity import TaskIdentity
from fedbpt.quantities import NaturalInt, PositiveFloat, PositiveInt


class SearchState(Message, frozen=True):
    """A Gaussian search distribution N(mean, σ²·C) over latents. Exactly one of ``scales``/``covariance`` may be set.

    ``mean`` [d]; ``scales`` [d] = √diag(C) of a separable search; ``covariance`` [d, d]; neither: C = I.
    ``step`` [d]: where set, a population's first two candidates are mean ± σ·step (two-point step-size adaptation).
    """

    mean: Array
    sigma: PositiveFloat
    scales: Array | None = None
    covariance: Array | None = None
    step: Array | None = None


class SelectWork(Message, frozen=True, tag="select"):
    """Score the zero-shot model with each template on at most ``max_rows`` random training rows (0: all).

    ``by_label``: sum the losses label by label, and say how many training rows there are of each.
    """

    templates: tuple[Template, ...]
    max_rows: NaturalInt = 64
    by_label: bool = False


class PooledWork(Message, frozen=True, tag="pooled"):
    """Score the population that ``state``, the run's seed and ``generation`` define on one mini-batch."""

    state: SearchState
    generation: NaturalInt
    popsize: PositiveInt


class SearchHistory(Message, frozen=True):
    """All that pooled search was told: where it began (`fedbpt.search.cma_es.CmaSearch`) and the candidates' ranks
    since.

    ``first``: its first generation; ``start`` [d]: its first mean, None for 0; ``ranks``: popsize bytes a generation,
    a byte for each candidate's rank. CMA-ES depends on nothing else.
    """

    sigma0: PositiveFloat
    popsize: Annotated[int, msgspec.Meta(ge=1, le=256)]
    covariance: Literal["diagonal", "full"]
    step_size: Literal["auto", "path", "two_point"]
    first: NaturalInt = 0
    start: Array | None = None
    ranks: bytes = b""


class ReplayWork(Message, frozen=True, tag="replay"):
    """A `PooledWork` without its state: the device makes that by replaying the search.

    ``history``: without the ranks of generations before ``known``, which the device has been told. ``plan_digest``: of
    the plan with the `PooledWork`, which is what a report answers.
    """

    history: SearchHistory
    known: NaturalInt
    plan_digest: Digest


class LocalWork(Message, frozen=True, tag="local"):
    """Run ``iterations`` generations of CMA-ES from ``state`` on the device's own rows (FedBPT, FedAvg of means)."""

    state: SearchState
    iterations: PositiveInt
    popsize: PositiveInt


FitPurpose: TypeAlias = Literal["calibration", "probe", "readout"]


class FitWork(Message, frozen=True, tag="fit"):
    """Give the means over at most ``max_rows`` training rows (0: all, always the same) that a readout is fitted by.

    ``latent`` [d]: the prompt. ``n_words``: of the readout, the first of the objective's ``readout_words``.
    ``readout``: where the loss and its gradient are asked for, with ``centre`` [n_words] taken from the words' logits
    in the latter; None: the moments of the words' logits, and the loss without a readout. ``others``: other templates,
    whose readouts are fitted too, without a prompt; n_templates = 1 + their number, ``centre`` [n_templates·n_words].
    """

    purpose: FitPurpose
    latent: Array
    n_words: NaturalInt
    readout: Readout | None = None
    centre: Array | None = None
    others: tuple[Template, ...] = ()
    max_rows: NaturalInt = 512


Work: TypeAlias = SelectWork | PooledWork | ReplayWork | LocalWork | FitWork


class SelectResult(Message, frozen=True, tag="select"):
    """``loss_sums``: sums over texts of the loss, nats; [n_templates], or [n_templates, n_labels] where asked by label.

    ``correct``: texts that each template gets right; empty of target texts, and in a private run. ``label_counts``:
    training rows of each label, scored or not; empty where not asked by label.
    """

    loss_sums: Array
    correct: tuple[quantities.Rows, ...] = ()
    label_counts: tuple[quantities.Rows, ...] = ()


class PooledResult(Message, frozen=True, tag="pooled"):
    """``losses`` [popsize]: mean loss of each candidate over the device's mini-batch, nats."""

    losses: Array


class LocalResult(Message, frozen=True, tag="local"):
    """``mean`` [d], ``fitness`` = F(mean) (lower is better), ``sigma_squares`` = Σ_i σ_i² over the iterations.

    ``ranks`` [iterations, popsize], a byte each: of the candidates by loss. All but the fitness follows from them.
    """

    mean: Array
    fitness: quantities.LossSum
    sigma_squares: quantities.Variance
    ranks: bytes = b""


class RanksResult(Message, frozen=True, tag="ranks"):
    """A `LocalResult` without its mean, which the coordinator makes by replaying; ``check``: see
    `fedbpt.search.compact_plans`.
    """

    ranks: bytes
    fitness: quantities.LossSum
    check: Digest


class FitResult(Message, frozen=True, tag="fit"):
    """Means over the rows. ``loss`` is the cross-entropy, nats, of several templates their mean.

    ``means``: [n_templates, n_words + 1] of x and ‖x‖² where moments were asked for; else [n_templates, 1 + n_words,
    n_labels], each template's gradient of its loss by its V, x less its centre.
    """

    purpose: FitPurpose
    loss: quantities.LossSum
    means: Array


Result: TypeAlias = SelectResult | PooledResult | LocalResult | RanksResult | FitResult


class RoundPlan(Message, frozen=True):
    """What the coordinator asks of a device in one round. ``seed`` is the run's; devices derive their own streams."""

    run: Name
    round: NaturalInt
    device: Name  # the name by which the coordinator knows this device; seeds its mini-batches
    seed: NaturalInt
    model_fingerprint: Fingerprint
    task: TaskIdentity
    labels: tuple[str, ...]
    template: Template
    prompt: PromptSpec
    objective: ObjectiveSpec
    work: Work
    label_bias: tuple[float, ...] = ()  # added to the label words' logits, one per label; empty: zeros
    label_weights: tuple[PositiveFloat, ...] = ()  # of a row's loss, one per label; empty: ones
    batch_size: NaturalInt | None = None  # of this device's mini-batches; None: the objective's
    privacy: PrivacySpec | None = None  # None: losses as they are
    deadline_s: PositiveFloat = 600.0
    protocol: Literal[1] = 1

    @property
    def texts(self) -> int:
        """Texts of a mini-batch; 0: all."""
        return self.objective.batch_size if self.batch_size is None else self.batch_size


class RoundReport(Message, frozen=True):
    """A device's answer to one `RoundPlan`. ``tokens`` counts forward tokens asked for; times are monotonic seconds."""

    run: Name
    round: quantities.Count
    device: Name
    plan_digest: Digest
    result: Result
    n_texts: quantities.SomeRows  # rows behind the result: its weight
    evaluations: quantities.Count  # candidates scored
    tokens: quantities.Tokens
    seconds: quantities.Seconds
    peak_rss_bytes: quantities.Bytes
    protocol: Literal[1] = 1


class RoundProgress(Message, frozen=True):
    """Where a round stands on a device. ``done`` of ``total`` steps; ``error`` says why where ``state`` is failed.

    ``paused``: why running work waits ("on battery"); empty: it does not.
    """

    run: Name
    round: quantities.Count
    state: Literal["running", "done", "failed", "cancelled"]
    done: quantities.Count = 0
    total: quantities.Count = 0
    error: str = ""
    paused: str = ""


class EvaluateRequest(Message, frozen=True):
    """Measure latents [k, d], k > 0, on the device's held-back rows.

    z = 0 is the model without a prompt, also in front, where P0 are random tokens. ``max_rows`` 0 = all rows; else the
    first ``max_rows``. ``split``: ``dev`` rows may choose, ``test`` rows report. ``label_weights``: as in `RoundPlan`.
    """

    model_fingerprint: Fingerprint
    task: TaskIdentity
    labels: tuple[str, ...]
    template: Template
    prompt: PromptSpec
    objective: ObjectiveSpec
    latents: Array
    readouts: tuple[Readout | None, ...] = ()  # one per latent; empty: none
    others: tuple[Template, ...] = ()  # the templates of the readouts' ``others``
    label_weights: tuple[PositiveFloat, ...] = ()
    split: Literal["dev", "test"] = "test"
    max_rows: NaturalInt = 0
    protocol: Literal[1] = 1


class EvaluateReport(Message, frozen=True):
    """Counts, so that reports of several devices add up. Index i belongs to latent i."""

    n: quantities.SomeRows
    correct: tuple[quantities.Rows, ...]
    loss_sums: tuple[quantities.LossSum, ...]
    seconds: quantities.Seconds
    protocol: Literal[1] = 1


class DeviceInfo(Message, frozen=True):
    """What a device says of itself. Never its data, nor label counts. ``celsius``, ``battery`` (%): None: not known.

    ``word_tokens``: by the digest of a template, tokens of its label words less one each; of its task's, if known.
    """

    name: Name
    version: str
    model_fingerprint: Fingerprint
    model_name: str
    backend: str
    n_train: quantities.Rows
    n_dev: quantities.Rows
    n_test: quantities.Rows
    ram_bytes: quantities.Bytes
    rss_bytes: quantities.Bytes
    peak_rss_bytes: quantities.Bytes
    tokens_per_second: quantities.Speed | None = None
    word_tokens: dict[str, quantities.Count] = msgspec.field(default_factory=dict)
    word_tokens_per_second: quantities.Speed | None = None
    shares_beginnings: bool = False  # under another template a text costs its end alone
    busy: bool = False
    paused: str = ""  # why its work waits; empty: it does not
    celsius: quantities.Celsius | None = None
    battery: quantities.Percent | None = None
    task: TaskIdentity | None = None  # None: said by a version before there were any
    protocol: Literal[1] = 1


class ErrorReply(Message, frozen=True):
    """The body of every 4xx and 5xx answer: a stable ``code`` and one line that says what to do."""

    code: str
    message: str
