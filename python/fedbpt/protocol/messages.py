"""The values that cross the wire between the coordinator and a device (design: ``docs/federation.md``).

Plain data only: msgspec structs, strict on decode (``forbid_unknown_fields``), arrays as little-endian bytes
with shape and dtype. Nothing here knows HTTP, the model or the search.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbpt import quantities
from fedbpt.argument_types import check_fields
from fedbpt.errors import WireError
from fedbpt.protocol.task_identity import TaskIdentity
from fedbpt.quantities import Length, NaturalInt, PositiveFloat, PositiveInt, Scale

Placement: TypeAlias = Literal["front", "cue"]
PromptPlace: TypeAlias = Literal["front", "first", "cue"]
Dtype: TypeAlias = Literal["<f2", "<f4", "<f8"]
LossName: TypeAlias = Literal["cross_entropy", "hinge", "nll"]

Name: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")]
Fingerprint: TypeAlias = Annotated[str, msgspec.Meta(max_length=128, pattern=r"^[!-~]*\Z")]
Digest: TypeAlias = Annotated[str, msgspec.Meta(max_length=128)]


def as_name(text: str) -> str:
    """``text`` with what a `Name` may not hold replaced: a model's own name, say, is free text."""
    return re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9._-]+", "-", text).strip("-._")[:128] or "unnamed"


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all wire values: immutable, keyword-only, strict."""


class CheckedMessage(Message, frozen=True):
    """Base of what people make, too: a field of the wrong kind raises `ConfigError` where it is made."""

    def __post_init__(self) -> None:
        check_fields(self)


class Array(Message, frozen=True):
    """A float array: ``data`` holds the little-endian bytes of ``shape`` elements in C order."""

    dtype: Dtype
    shape: Annotated[tuple[quantities.Count, ...], msgspec.Meta(max_length=8)]
    data: bytes

    @classmethod
    def of(cls, values: NDArray[np.floating], dtype: Dtype = "<f8") -> Array:
        """Pack ``values`` (any shape) as ``dtype``."""
        packed = np.ascontiguousarray(values, dtype=dtype)
        return cls(dtype=dtype, shape=packed.shape, data=packed.tobytes())

    def numpy(self) -> NDArray[np.float64]:
        """A new float64 array of ``shape``; raises `WireError` on a wrong length, NaN or infinity."""
        expected = math.prod(self.shape) * np.dtype(self.dtype).itemsize
        if len(self.data) != expected:
            raise WireError(
                f"array of shape {list(self.shape)} {self.dtype} needs {expected} bytes, got {len(self.data)}"
            )
        values = np.frombuffer(self.data, dtype=self.dtype).reshape(self.shape).astype(np.float64)
        if not np.isfinite(values).all():
            raise WireError("array holds NaN or infinity")
        return values


class Template(CheckedMessage, frozen=True):
    """One way to put a text to the model. ``pattern`` holds ``{text}`` once; what follows it is the answer cue.

    ``label_words`` has one word per label, in label order, each with its leading space where the cue ends
    without one. None where a text is to follow instead of a label.
    """

    pattern: str
    label_words: tuple[str, ...]


class PromptSpec(CheckedMessage, frozen=True):
    """How a latent z ∈ R^d becomes a soft prompt: vec(P) = vec(P0) + A z.

    A [n_prompt·n_embd, d] is drawn from ``seed`` with standard deviation α·std(E)/(√d·σ0), E the token
    embeddings. ``front``: P between BOS and the text, P0 random tokens' embeddings; ``first``: the same before BOS, as
    Hugging Face PEFT has it; ``cue``: P in place of the cue's last ``n_prompt`` tokens, P0 their own embeddings.
    """

    placement: PromptPlace = "cue"
    n_prompt: Length = 1
    d: Length = 500
    alpha: Scale = 0.5
    sigma0: Scale = 1.0
    seed: NaturalInt = 0


class ObjectiveSpec(CheckedMessage, frozen=True):
    """What a device minimises. ``perturb`` is the token replacement probability r of the perturbed ratio (0: off).

    ``nll``: the negative log-likelihood of a target text's tokens, for tasks without labels; it goes with them alone.
    """

    loss: LossName = "cross_entropy"
    batch_size: NaturalInt = 8  # texts per generation, drawn anew each time; 0 = all
    max_text_tokens: PositiveInt = 128
    readout_words: Annotated[int, msgspec.Meta(ge=0, le=2**20)] = (
        128  # random words whose logits a readout may use; 0: a bias alone
    )
    perturb: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0


class PrivacySpec(CheckedMessage, frozen=True):
    """Clip and noise of what a device sends (`fedbpt.objective.privacy`).

    ``clip`` C, nats: of a row's losses, less their mean over the candidates, the Euclidean norm at most.
    ``noise_multiplier`` z: the noise has standard deviation z·C in the sum over rows. ``delta``: at which ε is told.
    """

    clip: PositiveFloat
    noise_multiplier: PositiveFloat
    delta: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 1e-5


class Readout(Message, frozen=True):
    """Label logits s + (1, x)·V of a text: s [n_labels] the label words' logits, x [n_words] those of random words.

    ``weights`` V [1 + n_words, n_labels], its first row a bias per label; n_words 0: a bias alone. Which words:
    `fedbpt.objective.readout.word_ids`. ``others``: the V of other templates without a prompt; labels'
    log-probabilities are then the mean over all templates.
    """

    weights: Array
    others: tuple[Array, ...] = ()


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
    word_tokens: dict[str, quantities.Count] = {}
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
