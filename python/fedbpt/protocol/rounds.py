"""Messages between the coordinator and a device: plans, reports, evaluations (design: ``docs/federation.md``).

Plain data, see `fedbpt.protocol.specs`; independent of HTTP, the model and the search.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

from fedbpt import quantities
from fedbpt.protocol.specs import (
    Array,
    Digest,
    Fingerprint,
    Generation,
    LayerReadout,
    Message,
    Name,
    ObjectiveSpec,
    PrivacySpec,
    PromptSpec,
    Quantized,
    Readout,
    Template,
)
from fedbpt.protocol.task_identity import TaskIdentity
from fedbpt.quantities import Clip, NaturalInt, PositiveFloat, PositiveInt


class SearchState(Message, frozen=True):
    """A Gaussian search distribution N(mean, σ²·C) over latents. Exactly one of ``scales``/``covariance`` may be set.

    ``mean`` [d]; ``scales`` [d] = √diag(C) of a separable search; ``covariance`` [d, d]; neither: C = I.
    ``step`` [d]: if set, the first two candidates of a population are mean ± σ·step (two-point step-size adaptation).
    """

    mean: Array
    sigma: PositiveFloat
    scales: Array | None = None
    covariance: Array | None = None
    step: Array | None = None


class SelectWork(Message, frozen=True, tag="select"):
    """Score the zero-shot model with each template on at most ``max_rows`` random training rows (0: all).

    ``by_label``: sum the losses per label, and report the number of training rows of each label.
    """

    templates: tuple[Template, ...]
    max_rows: NaturalInt = 64
    by_label: bool = False


class PooledWork(Message, frozen=True, tag="pooled"):
    """Score on one mini-batch the population that follows from ``state``, the run's seed and ``generation``."""

    state: SearchState
    generation: NaturalInt
    popsize: PositiveInt


class SearchHistory(Message, frozen=True):
    """All that determines a pooled search (`fedbpt.search.cma_es.CmaSearch`): its start and its candidates' ranks.

    ``first``: number of its first generation. ``start`` [d]: initial mean; None: 0. ``ranks``: popsize bytes per
    generation, one byte for each candidate's rank.
    """

    sigma0: PositiveFloat
    popsize: Annotated[int, msgspec.Meta(ge=1, le=256)]
    covariance: Literal["diagonal", "full"]
    step_size: Literal["auto", "path", "two_point"]
    first: NaturalInt = 0
    start: Array | None = None
    ranks: bytes = b""


class ReplayWork(Message, frozen=True, tag="replay"):
    """A `PooledWork` without its state, which the device recomputes by replaying the search.

    ``history``: without the ranks of generations before ``known``, which the device already has. ``plan_digest``: of
    the plan with the `PooledWork`, which the report refers to.
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
    """Compute the means over at most ``max_rows`` training rows (0: all; the same rows each time) that fit a readout.

    ``latent`` [d]: the prompt. ``n_words``: number of the readout's words, the first of the objective's
    ``readout_words``. ``readout``: the point at which to compute the loss and its gradient, where ``centre``
    [n_templates·n_words] is subtracted from the words' logits; None: compute the moments of the words' logits, and the
    loss without a readout. ``others``: other templates whose readouts are fitted too, without a prompt; n_templates is
    1 + their number.
    """

    purpose: FitPurpose
    latent: Array
    n_words: NaturalInt
    readout: Readout | None = None
    centre: Array | None = None
    others: tuple[Template, ...] = ()
    max_rows: NaturalInt = 512


N_FOLDS: Final = 4
"""Folds of a device's training rows. The first judges what is shipped: `Reading` and `HeldRows` divide rows alike."""


class Reading(Message, frozen=True):
    """What the fit of a `LayerReadout` reads: rows, templates and layers.

    ``latent`` [d]: the prompt with which the plan's template is read first; 0: none. ``templates`` are then read
    without a prompt. A view is one of these readings of a row. ``n_word_views``: first views in which the label words
    are scored too. At most ``max_rows`` training rows (0: all) in ``n_folds`` folds. ``n_embd``: size of the states; 0:
    unknown.
    """

    latent: Array
    templates: tuple[Template, ...]
    layers: tuple[NaturalInt, ...]
    n_word_views: NaturalInt
    max_rows: NaturalInt = 512
    n_folds: Annotated[int, msgspec.Meta(ge=2, le=16)] = N_FOLDS
    n_embd: NaturalInt = 0

    @property
    def n_views(self) -> int:
        return 1 + len(self.templates)

    @property
    def n_readers(self) -> int:
        """Pairs of a view and a layer, views first."""
        return self.n_views * len(self.layers)


class SumsWork(Message, frozen=True, tag="sums"):
    """Sum up the states of each reader, fold by fold (`fedbpt.engine.discriminant.FoldSums`).

    ``max_rank``: most rows of a fold's factor.
    """

    purpose: FitPurpose
    reading: Reading
    max_rank: PositiveInt


class CrossWork(Message, frozen=True, tag="cross"):
    """Compute the losses of mixtures of classifiers, each row with those that were fitted without its fold.

    Logits of mixture m: Σ_j coefficients[m, j]·(x_r(j)·W[f, j] + biases[f, j]) + Σ_v word_scales[m, v]·(s_v −
    centres_v), for a row of fold f with the states x of reader r(j) = ``readers[j]`` and the log-probabilities s_v of
    the label words in view v.

    ``weights``: W [n_folds, n_columns, n_embd, n_labels]; ``biases`` [n_folds, n_columns, n_labels]; ``coefficients``
    [n_mixtures, n_columns]; ``word_scales`` [n_mixtures, n_views]; ``centres`` [n_views, n_labels].
    """

    purpose: FitPurpose
    reading: Reading
    readers: tuple[NaturalInt, ...]
    weights: Array
    biases: Array
    coefficients: Array
    word_scales: Array
    centres: Array


class MomentsWork(Message, frozen=True, tag="moments"):
    """Compute the moments of the states of ``reading``, by which logistic regression standardises them."""

    purpose: FitPurpose
    reading: Reading


class LogisticWork(Message, frozen=True, tag="logistic"):
    """Compute the loss of label logits, and its gradient, at some points; the second is without the rows of fold 0.

    Logits at point p: bias[p] + Σ_vl (x_vl − centre_vl)·weights[p, v, l] + Σ_v word_scales[p, v]·(s_v − word_centre_v),
    for a row with the states x_vl of view v and layer l, and the log-probabilities s_v of the label words in view v.

    ``centre`` [n_views, n_layers, n_embd]; ``word_centre`` [n_word_views, n_labels]; ``weights`` [n_points, n_views,
    n_layers, n_embd, n_labels]; ``word_scales`` [n_points, n_word_views]; ``bias`` [n_points, n_labels].
    """

    purpose: FitPurpose
    reading: Reading
    centre: Array
    word_centre: Array
    weights: Array
    word_scales: Array
    bias: Array


class SketchWork(Message, frozen=True, tag="sketch"):
    """Sum up each reader's states, in numbers that can be added up over devices before they are seen.

    Of Σxxᵀ [n_embd, n_embd] a device sends its product with a random matrix of ``rank`` columns
    (`fedbpt.engine.discriminant.sketching`), from which it follows where no more than ``rank`` rows are in the sum.
    """

    purpose: FitPurpose
    reading: Reading
    rank: PositiveInt


class PublicWork(Message, frozen=True, tag="public"):
    """Read ``n_texts`` made-up texts (`fedbpt.tasks.public_texts`), which say nothing about rows."""

    purpose: FitPurpose
    reading: Reading
    n_texts: Annotated[int, msgspec.Meta(ge=4, le=4096)]


class MeansWork(Message, frozen=True, tag="means"):
    """Sum up the training rows once, clipped and with noise (`fedbpt.engine.noisy_means`); for private runs only.

    The frame of public texts: ``centre`` [n_readers, n_embd], ``projection`` [n_readers, n_embd, p], ``word_centres``
    [n_word_views, n_labels], and ``word_clip``, nats. `fedbpt.protocol.codec` bounds the arrays, as all others.
    """

    purpose: FitPurpose
    reading: Reading
    centre: Array
    projection: Array
    word_centres: Array
    word_clip: Clip


PrivateFitWork: TypeAlias = PublicWork | MeansWork
"""An exchange of a fit with differential privacy."""

LayersWork: TypeAlias = SumsWork | CrossWork | MomentsWork | LogisticWork | SketchWork
"""An exchange of any other fit that reads hidden states."""


class KeysWork(Message, frozen=True, tag="keys"):
    """Make the keys of an epoch of secure aggregation, for ``n_uses`` sums (``docs/secure.md``)."""

    epoch: Name
    n_uses: Annotated[int, msgspec.Meta(ge=1, le=4096)]


class KeysResult(Message, frozen=True, tag="keys"):
    """A device's public keys. ``identity``: Ed25519, made by the device and kept; ``signature``: by it, of the others.

    ``cipher_key``: X25519, for shares. For each use, 32 bytes of ``mask_keys``, an X25519 key, and of ``seed_digests``,
    the SHA-256 of its own mask's seed.
    """

    identity: bytes
    cipher_key: bytes
    mask_keys: bytes
    seed_digests: bytes
    signature: bytes


class SharesWork(Message, frozen=True, tag="shares"):
    """Share this device's secrets with ``names``, itself among them, whose ``keys`` these are."""

    epoch: Name
    threshold: PositiveInt
    names: tuple[Name, ...]
    keys: tuple[KeysResult, ...]


class SharesResult(Message, frozen=True, tag="shares"):
    """``sealed``: for each of the names, its shares of both secrets of each use, which it alone can read."""

    sealed: tuple[bytes, ...]


class UnmaskWork(Message, frozen=True, tag="unmask"):
    """Reveal this device's shares for one sum: of the seeds of ``survivors``, of the mask keys of ``dropped``.

    ``sealed``: the shares of this use that each of them, survivors first, has sealed for this device.
    """

    epoch: Name
    index: NaturalInt
    survivors: tuple[Name, ...]
    dropped: tuple[Name, ...]
    sealed: tuple[bytes, ...]


class UnmaskResult(Message, frozen=True, tag="unmask"):
    """``shares``: one for each of the survivors and then of the dropped devices."""

    shares: tuple[bytes, ...]


SecureWork: TypeAlias = KeysWork | SharesWork | UnmaskWork
"""An exchange of secure aggregation, besides the masked results themselves."""

Work: TypeAlias = SelectWork | PooledWork | ReplayWork | LocalWork | FitWork | LayersWork | PrivateFitWork | SecureWork


class SelectResult(Message, frozen=True, tag="select"):
    """``loss_sums``: loss summed over texts, nats, [n_templates]; [n_templates, n_labels] if ``by_label``.

    ``correct``: number of texts classified correctly with each template; empty for target texts and in a private run.
    ``label_counts``: number of training rows of each label, scored or not; empty unless ``by_label``. ``sizes``
    [n_templates, n_layer]: sizes of shifts, if the plan's prompt shifts (`fedbpt.engine.layers.shift_sizes`).
    ``reward_sums`` [n_templates]: the metric's values of the model's own answers under each template, summed over
    ``n_answered`` texts, if the plan's objective has a ``generation`` and the device measures answers so.
    """

    loss_sums: Array
    correct: tuple[quantities.Rows, ...] = ()
    label_counts: tuple[quantities.Rows, ...] = ()
    sizes: Array | UnsetType = UNSET
    reward_sums: Array | UnsetType = UNSET
    n_answered: quantities.SomeRows | UnsetType = UNSET


class PooledResult(Message, frozen=True, tag="pooled"):
    """``losses`` [popsize]: mean loss of each candidate over the device's mini-batch, nats."""

    losses: Array


class LocalResult(Message, frozen=True, tag="local"):
    """``mean`` [d], ``fitness`` = F(mean) (lower is better), ``sigma_squares`` = Σ_i σ_i² over the iterations.

    ``ranks`` [iterations, popsize], one byte each: the candidates' ranks by loss, which determine all but the fitness.
    """

    mean: Array
    fitness: quantities.LossSum
    sigma_squares: quantities.Variance
    ranks: bytes = b""


class RanksResult(Message, frozen=True, tag="ranks"):
    """A `LocalResult` without its mean, which the coordinator recomputes by replaying the search.

    ``check``: see `fedbpt.search.compact_plans`.
    """

    ranks: bytes
    fitness: quantities.LossSum
    check: Digest


class FitResult(Message, frozen=True, tag="fit"):
    """Means over the rows. ``loss``: cross-entropy, nats, averaged over templates.

    ``means``: the moments x and ‖x‖² [n_templates, n_words + 1] if `FitWork.readout` is None; else each template's
    gradient of its loss with respect to its V [n_templates, 1 + n_words, n_labels], with x less its centre.
    """

    purpose: FitPurpose
    loss: quantities.LossSum
    means: Array


class SumsResult(Message, frozen=True, tag="sums"):
    """Sums of a device's rows.

    ``counts`` [n_folds, n_labels]: rows. ``ranks`` [n_folds]: rows of each fold's factor. ``centres`` [n_readers,
    n_embd]: mean states. ``means`` [n_readers, n_cells, n_embd]: for each fold, the mean states of the labels that it
    has, less the centre. ``factors`` [n_readers, Σ ranks, n_embd]: each fold's factor; quantised apart from the means,
    which are far smaller. ``rests`` [n_readers, n_folds, n_embd]: what factors leave out of the scatter; empty if
    nothing. ``word_means`` [n_word_views, n_labels]: mean log-probabilities of the label words. ``loss``: of the label
    words in the first view, or else of the labels' shares, nats.
    """

    purpose: FitPurpose
    loss: quantities.LossSum
    counts: tuple[tuple[quantities.Count, ...], ...]
    ranks: tuple[quantities.Count, ...]
    centres: Array
    means: Quantized
    factors: Quantized
    rests: Array
    word_means: Array


class CrossResult(Message, frozen=True, tag="cross"):
    """``loss_sums`` [n_mixtures, n_folds]: weighted losses summed over a fold's rows, nats."""

    purpose: FitPurpose
    loss_sums: Array


class MomentsResult(Message, frozen=True, tag="moments"):
    """Means over rows. ``means`` and ``squares`` [n_views, n_layers, n_embd]: of states and of their squares.

    ``word_means`` [n_word_views, n_labels]: of the label words' log-probabilities. ``word_squares`` [n_word_views]: of
    the squares of these less their means. ``loss``: of the label words in the first view; without them, of all
    labels alike; nats.
    """

    purpose: FitPurpose
    loss: quantities.LossSum
    means: Array
    squares: Array
    word_means: Array
    word_squares: Array


class LogisticResult(Message, frozen=True, tag="logistic"):
    """``losses`` [n_points]: mean cross-entropy, nats. Gradients by `LogisticWork`'s ``weights``, ``word_scales`` and
    ``bias``, of their shapes.
    """

    purpose: FitPurpose
    losses: Array
    by_weights: Array
    by_word_scales: Array
    by_bias: Array


class SketchResult(Message, frozen=True, tag="sketch"):
    """Sums over rows.

    ``counts`` [n_folds, n_labels]: rows. ``sums`` [n_readers, n_folds, n_labels, n_embd] of states, ``squares``
    [n_readers, n_folds, n_embd] of their squares. ``sketches`` [n_readers, n_folds, n_embd, rank]: of Σxxᵀ.
    ``word_means`` [n_word_views, n_labels] and ``loss`` as in `SumsResult`.
    """

    purpose: FitPurpose
    loss: quantities.LossSum
    counts: Array
    sums: Array
    squares: Array
    sketches: Array
    word_means: Array


class PublicResult(Message, frozen=True, tag="public"):
    """What a model makes of the public texts.

    ``centres`` [n_readers, n_embd]: mean states. ``states`` [n_readers, n_texts, n_embd]: the others', less these.
    ``words`` [n_texts, n_word_views, n_labels]: the label words' log-probabilities.
    """

    purpose: FitPurpose
    centres: Array
    states: Quantized
    words: Array


class MeansResult(Message, frozen=True, tag="means"):
    """Noisy sums over rows: ``label_sums`` [n_labels], ``state_sums`` [n_labels, p] and ``word_sums`` [n_labels].

    Those of `fedbpt.engine.noisy_means.NoisySums`, in its order.
    """

    purpose: FitPurpose
    label_sums: Array
    state_sums: Array
    word_sums: Array


class MaskedField(Message, frozen=True):
    """A field of a masked result: its name, shape, and the bits of a number."""

    name: str
    shape: Annotated[tuple[quantities.Count, ...], msgspec.Meta(max_length=8)]
    bits: Literal[32, 64]


class MaskedResult(Message, frozen=True, tag="masked"):
    """A result that only tells something in the sum over all devices of `SecureUse`.

    ``fields``: what ``data`` holds, little-endian integers, those of 64 bits first.
    """

    fields: tuple[MaskedField, ...]
    data: bytes


Result: TypeAlias = (
    SelectResult
    | PooledResult
    | LocalResult
    | RanksResult
    | FitResult
    | SumsResult
    | CrossResult
    | MomentsResult
    | LogisticResult
    | SketchResult
    | PublicResult
    | MeansResult
    | KeysResult
    | SharesResult
    | UnmaskResult
    | MaskedResult
)


class SecureUse(Message, frozen=True):
    """That a result is to be masked, as sum number ``index`` of ``epoch`` over the devices ``peers``, in order of name.

    Masks are bound to this and to all that the peers' plans have in common: they only cancel out among devices that
    were asked the same. ``most_rows``: a device counts for at most as many rows, and its labels for at most
    ``most_counted``; 0: for all. ``largest``: bound of the sums of states over all peers.
    """

    epoch: Name
    index: NaturalInt
    peers: tuple[Name, ...]
    most_rows: NaturalInt = 0
    most_counted: NaturalInt = 0
    largest: PositiveFloat = 1.0


class HeldRows(Message, frozen=True):
    """Training rows that judge what is shipped: the first of ``n_folds`` folds of at most ``max_rows`` (0: all)."""

    seed: NaturalInt
    max_rows: NaturalInt = 512
    n_folds: Annotated[int, msgspec.Meta(ge=2, le=16)] = N_FOLDS


class RoundPlan(Message, frozen=True):
    """A device's work in one round. ``seed``: the run's, from which devices derive their own streams."""

    run: Name
    round: NaturalInt
    device: Name  # the coordinator's name for this device; seeds its mini-batches
    seed: NaturalInt
    model_fingerprint: Fingerprint
    task: TaskIdentity
    labels: tuple[str, ...]
    template: Template
    prompt: PromptSpec
    objective: ObjectiveSpec
    work: Work
    label_bias: tuple[float, ...] = ()  # one per label, added to the label words' logits; empty: zeros
    label_weights: tuple[PositiveFloat, ...] = ()  # one per label, weights of the rows' losses; empty: ones
    batch_size: NaturalInt | None = None  # texts in this device's mini-batches; None: the objective's
    privacy: PrivacySpec | None = None  # None: losses without clipping and noise
    held: HeldRows | None = None  # training rows that the search does not see; None: it sees all
    deadline_s: PositiveFloat = 600.0
    secure: SecureUse | UnsetType = UNSET
    protocol: Literal[1] = 1

    @property
    def texts(self) -> int:
        """Number of texts in a mini-batch; 0: all."""
        return self.objective.batch_size if self.batch_size is None else self.batch_size


class RoundReport(Message, frozen=True):
    """A device's result for one `RoundPlan`. ``tokens``: forward tokens requested; times are monotonic seconds.

    ``devices``: of a sum that the coordinator has unmasked, those in it.
    """

    run: Name
    round: quantities.Count
    device: Name
    plan_digest: Digest
    result: Result
    n_texts: quantities.SomeRows  # number of rows behind the result, its weight
    evaluations: quantities.Count  # candidates scored
    tokens: quantities.Tokens
    seconds: quantities.Seconds
    peak_rss_bytes: quantities.Bytes
    devices: tuple[Name, ...] | UnsetType = UNSET
    protocol: Literal[1] = 1


class RoundProgress(Message, frozen=True):
    """Progress of a round on a device: ``done`` of ``total`` steps. ``error``: the reason if ``state`` is "failed".

    ``paused``: why running work is paused ("on battery"); empty: it is not.
    """

    run: Name
    round: quantities.Count
    state: Literal["running", "done", "failed", "cancelled"]
    done: quantities.Count = 0
    total: quantities.Count = 0
    error: str = ""
    paused: str = ""


class EvaluateRequest(Message, frozen=True):
    """Evaluate latents [k, d], k > 0, on the device's held-out rows.

    z = 0 stands for the model without a prompt, even where P0 are random tokens (``front``). ``max_rows``: number of
    rows, at equal distances; 0: all. ``split``: ``dev`` rows may decide, ``test`` rows only report, ``held`` rows are
    training rows that the search has not seen (`RoundPlan.held`). ``label_weights``: as in `RoundPlan`.
    ``generation``: let the model answer the texts; the loss of a text is then 1 − the metric's value, 0 to 1, and an
    answer of value 1 is correct.
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
    layer_readouts: tuple[LayerReadout | None, ...] = ()  # one per latent, in the place of its readout; empty: none
    label_weights: tuple[PositiveFloat, ...] = ()
    split: Literal["dev", "test", "held"] = "test"
    held: HeldRows | None = None  # which rows are held; required for their split
    max_rows: NaturalInt = 0
    generation: Generation | UnsetType = UNSET
    secure: SecureUse | UnsetType = UNSET
    protocol: Literal[1] = 1


class EvaluateReport(Message, frozen=True):
    """Sums over ``n`` rows, so that reports of several devices add up; index i is of latent i.

    ``difference_squares``: of held rows, Σ (loss of latent i − loss of latent 0)²; else empty. Of answers:
    ``n_failed`` that the metric failed on, and ``n_distinct`` different ones. ``masked``: all of these, where the
    request is ``secure``; they are then empty, and ``n`` is 1.
    """

    n: quantities.SomeRows
    correct: tuple[quantities.Rows, ...]
    loss_sums: tuple[quantities.LossSum, ...]
    seconds: quantities.Seconds
    difference_squares: tuple[quantities.LossSum, ...] = ()
    n_failed: tuple[quantities.Rows, ...] | UnsetType = UNSET
    n_distinct: tuple[quantities.Rows, ...] | UnsetType = UNSET
    masked: MaskedResult | UnsetType = UNSET
    protocol: Literal[1] = 1


class DeviceInfo(Message, frozen=True):
    """A device's description of itself, without its data or label counts. ``celsius``, ``battery`` (%): None: unknown.

    ``word_tokens``: tokens of the label words beyond one each, by digest of the template; of its task's templates.
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
    shares_beginnings: bool = False  # under another template a text costs only its tail
    n_layer: quantities.Count = 0  # layers whose states can be read; 0: none, or a version that reads none
    n_embd: quantities.Count = 0
    busy: bool = False
    paused: str = ""  # why its work is paused; empty: it is not
    celsius: quantities.Celsius | None = None
    battery: quantities.Percent | None = None
    task: TaskIdentity | None = None  # None: from a version without task identities
    protocol: Literal[1] = 1


class ErrorReply(Message, frozen=True):
    """The body of every 4xx and 5xx response: a stable ``code`` and a one-line message that says what to do."""

    code: str
    message: str
