"""Building blocks of messages, and the specs of a prompt and its objective.

Plain data: msgspec structs that refuse unknown fields, arrays as little-endian bytes with shape and dtype.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Final, Literal, TypeAlias

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType
from numpy.typing import NDArray

from fedbpt import quantities
from fedbpt.argument_types import StructMeta, check_fields
from fedbpt.errors import ConfigError, TaskError, WireError
from fedbpt.metrics import check_metric
from fedbpt.quantities import Length, LossClip, NaturalInt, NoiseMultiplier, PositiveFloat, PositiveInt, Scale

Placement: TypeAlias = Literal["front", "cue", "layer", "layers"]
PromptPlace: TypeAlias = Literal["front", "first", "cue", "layer", "layers"]
Dtype: TypeAlias = Literal["<f2", "<f4", "<f8"]
LossName: TypeAlias = Literal["cross_entropy", "hinge", "nll"]

Name: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")]
Fingerprint: TypeAlias = Annotated[str, msgspec.Meta(max_length=128, pattern=r"^[!-~]*\Z")]
Digest: TypeAlias = Annotated[str, msgspec.Meta(max_length=128)]


def as_name(text: str) -> str:
    """``text`` as a valid `Name`, invalid characters replaced by dashes; a model's own name is free text."""
    return re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9._-]+", "-", text).strip("-._")[:128] or "unnamed"


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all messages and their parts: immutable, keyword-only, without unknown fields."""


class CheckedMessage(Message, frozen=True, metaclass=StructMeta):
    """Base of structs that users make too: the constructor raises `ConfigError` for a field of wrong name or type."""

    def __post_init__(self) -> None:
        check_fields(self)


_SMALLEST_STEP = 1e-7  # about the smallest float16


class Array(Message, frozen=True):
    """A float array. ``data``: its elements in C order, little-endian."""

    dtype: Dtype
    shape: Annotated[tuple[quantities.Count, ...], msgspec.Meta(max_length=8)]
    data: bytes

    @classmethod
    def of(cls, values: NDArray[np.floating], dtype: Dtype = "<f8") -> Array:
        """Pack ``values``, of any shape, as ``dtype``."""
        packed = np.ascontiguousarray(values, dtype=dtype)
        return cls(dtype=dtype, shape=packed.shape, data=packed.tobytes())

    def numpy(self) -> NDArray[np.float64]:
        """A new float64 array of ``shape``. Raises `WireError` for a wrong length, NaN or infinity."""
        expected = math.prod(self.shape) * np.dtype(self.dtype).itemsize
        if len(self.data) != expected:
            raise WireError(
                f"an array {self.dtype} of shape {list(self.shape)} must have {expected} bytes, got {len(self.data)}"
            )
        values = np.frombuffer(self.data, dtype=self.dtype).reshape(self.shape).astype(np.float64)
        if not np.isfinite(values).all():
            raise WireError("an array must be finite")
        return values


class Template(CheckedMessage, frozen=True):
    """A pattern that a text is inserted into. ``pattern`` contains ``{text}`` once; what follows it is the answer cue.

    ``label_words``: one word per label, in label order, with a leading space if the cue does not end in one; empty for
    a task of target texts.
    """

    pattern: str
    label_words: tuple[str, ...]


class Shift(CheckedMessage, frozen=True):
    """Consecutive layers whose outputs are shifted, from 0, and the size of a shift of each at α = 1, per number."""

    layers: tuple[NaturalInt, ...]
    sizes: tuple[PositiveFloat, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        consecutive = tuple(range(self.layers[0], self.layers[0] + len(self.layers))) if self.layers else ()
        if not self.layers or self.layers != consecutive or len(self.sizes) != len(self.layers):
            raise ConfigError(
                f"a shift must have consecutive layers and one size for each, got layers {list(self.layers)} and "
                f"{len(self.sizes)} sizes",
                field="shift",
            )


class PromptSpec(CheckedMessage, frozen=True):
    """How a latent z ∈ R^d becomes a soft prompt: vec(P) = vec(P0) + A z.

    A [n_prompt·n_embd, d] is drawn from ``seed`` with standard deviation α·std(E)/(√d·σ0), where E are the token
    embeddings. ``front``: P goes between BOS and the text, P0 are the embeddings of random tokens. ``first``: the same,
    but before BOS, as in Hugging Face PEFT. ``cue``: P replaces the cue's last ``n_prompt`` tokens, P0 are their
    embeddings.

    ``layer``: P is one row that is added to the output of a middle layer at the cue's last token. ``layers``: P has a
    row for each layer, added to its output at the cue's last token and at each later one. P0 is 0, and row i of A has
    standard deviation α·sizes[i]/(√d·σ0), with the sizes of ``shift``, which a run measures; n_prompt follows from it.
    """

    placement: PromptPlace = "cue"
    n_prompt: Length = 1
    d: Length = 500
    alpha: Scale = 0.5
    sigma0: Scale = 1.0
    seed: NaturalInt = 0
    shift: Shift | UnsetType = UNSET  # left out of messages: earlier versions refuse unknown fields

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift is not UNSET:
            self._check_shift(self.shift)
        n_rows = 1 if self.shift is UNSET else len(self.shift.layers)
        if self.shifts and self.n_prompt != n_rows:
            raise ConfigError(
                f"placement {self.placement!r} has a row per layer, so n_prompt must be {n_rows}, got {self.n_prompt}: "
                "leave it out",
                field="n_prompt",
            )

    def _check_shift(self, shift: Shift) -> None:
        fits = {"layer": len(shift.layers) == 1, "layers": shift.layers[0] == 0}.get(self.placement, False)
        if not fits:
            raise ConfigError(
                f"placement {self.placement!r} must not have a shift of layers {list(shift.layers)}: 'layer' expects "
                "one layer, 'layers' all from 0, the others none",
                field="shift",
            )

    @property
    def shifts(self) -> bool:
        """Whether rows are added to layers' outputs."""
        return self.placement in ("layer", "layers")

    @property
    def in_front(self) -> bool:
        """Whether rows are tokens of their own, before the text."""
        return self.placement in ("front", "first")

    @property
    def shifted_layer(self) -> int | None:
        """The one shifted layer of placement ``layer``; None for other placements."""
        return self.shift.layers[0] if self.placement == "layer" and self.shift is not UNSET else None

    def shifting(self, shift: Shift) -> PromptSpec:
        """This spec with its ``shift``."""
        return msgspec.structs.replace(self, shift=shift, n_prompt=len(shift.layers))


class Generation(CheckedMessage, frozen=True):
    """How a model's answers to a task's texts are generated and measured.

    Attributes:
        metric: name of a metric, see `fedbpt.metrics.NAMED`.
        max_tokens: maximum length of an answer.
        stop: strings that end an answer, and are not part of it.
    """

    metric: str = "exact-match"
    max_tokens: Length = 48
    stop: tuple[str, ...] = ("\n",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.stop):
            raise TaskError("a stop string is empty: leave it out", field="stop")
        check_metric(self.metric)


class ObjectiveSpec(CheckedMessage, frozen=True):
    """What a device minimises. ``perturb``: token replacement probability r of the perturbed ratio; 0: off.

    ``nll``: negative log-likelihood of a target text's tokens, the only loss for tasks without labels.
    ``generation``: a search minimises 1 − the metric of the model's own answers instead; set by a run
    (`RunSettings.metric_share`).
    """

    loss: LossName = "cross_entropy"
    batch_size: NaturalInt = 8  # texts per generation, drawn anew each time; 0: all
    max_text_tokens: PositiveInt = 128
    # random words whose logits a readout may use; 0: only a bias
    readout_words: Annotated[int, msgspec.Meta(ge=0, le=2**20)] = 128
    perturb: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    generation: Generation | UnsetType = UNSET


READOUT_NOISE: Final = 1.16
"""Default of `PrivacySpec.readout_noise`: ε 3.99 at δ 1e-5."""


class PrivacySpec(CheckedMessage, frozen=True):
    """Clipping and noise of what a device sends (`fedbpt.objective.privacy`).

    ``clip`` C: maximum Euclidean norm of a row's losses over the candidates, less their mean, nats.
    ``noise_multiplier`` z: the noise on the sum of losses over rows has standard deviation z·C. ``delta``: the δ at
    which ε is reported. ``readout_noise``: the noise multiplier of the sum that a readout is made from, once a run, to
    which a row adds at most 1 in norm; left out: `READOUT_NOISE`.
    """

    clip: LossClip = 0.3
    noise_multiplier: NoiseMultiplier = 2.0
    delta: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 1e-5
    readout_noise: NoiseMultiplier | UnsetType = UNSET

    @property
    def noise_of_readout(self) -> float:
        return READOUT_NOISE if self.readout_noise is UNSET else self.readout_noise


class Readout(Message, frozen=True):
    """A linear correction of a text's label logits: s + (1, x)·V.

    s [n_labels] are the label words' logits, x [n_words] those of random words (`fedbpt.objective.readout.word_ids`).
    ``weights``: V [1 + n_words, n_labels], whose first row is a bias per label. ``others``: V of other templates, which
    have no prompt; the labels' log-probabilities are then averaged over all templates.
    """

    weights: Array
    others: tuple[Array, ...] = ()


class Quantized(Message, frozen=True):
    """Numbers of 4 bits each. ``shape`` [r, n, m]; ``scales`` [r, m]; ``data``: two codes 1 … 15 a byte, the first low.

    A number is (code − 8)·scale.
    """

    shape: Annotated[tuple[quantities.Count, ...], msgspec.Meta(min_length=3, max_length=3)]
    scales: Array
    data: bytes

    @classmethod
    def of(cls, values: NDArray[np.floating]) -> Quantized:
        """Round ``values`` [r, n, m] to 15 levels for each [r, m], by its largest value."""
        scales = Array.of(np.maximum(np.abs(values).max(axis=1, initial=0.0) / 7, _SMALLEST_STEP), "<f2")
        steps = np.maximum(scales.numpy(), _SMALLEST_STEP)[:, None]
        codes = (np.clip(np.rint(values / steps), -7, 7).ravel() + 8).astype(np.uint8)
        codes = np.append(codes, np.zeros(codes.size % 2, np.uint8))
        return cls(shape=values.shape, scales=scales, data=(codes[::2] | codes[1::2] << 4).tobytes())

    @property
    def n_bytes(self) -> int:
        """Length that ``data`` must have."""
        return (math.prod(self.shape) + 1) // 2

    def numpy(self) -> NDArray[np.float64]:
        """A new float64 array of ``shape``. Raises `WireError` for wrong lengths, NaN or infinity."""
        if len(self.data) != self.n_bytes or self.scales.shape != self.shape[::2]:
            raise WireError(
                f"numbers of shape {list(self.shape)} must have {self.n_bytes} bytes and scales "
                f"{list(self.shape[::2])}, got {len(self.data)} and {list(self.scales.shape)}"
            )
        pairs = np.frombuffer(self.data, np.uint8)
        codes = np.stack([pairs & 15, pairs >> 4], axis=1).ravel()[: math.prod(self.shape)].astype(np.float64) - 8
        found: NDArray[np.float64] = codes.reshape(self.shape) * self.scales.numpy()[:, None]
        return found


class LayerReadout(Message, frozen=True):
    """Label logits from the hidden states of some layers: bias + Σ_t (word_scales_t·s_t + Σ_l x_tl·W_tl).

    Under template t, x_tl [n_embd] is the state of layer l at the last token over its root mean square, and s_t
    [n_labels] the log-probabilities of the label words, over the labels. The first template is the prompt's own, with
    the prompt; ``others`` have none. ``weights``: W [n_templates, n_layers, n_embd, n_labels]; ``word_scales``
    [n_templates], 0: the label words are not scored; ``bias`` [n_labels].
    """

    layers: tuple[NaturalInt, ...]
    weights: Array
    word_scales: Array
    bias: Array
    others: tuple[Template, ...] = ()

    @property
    def places_read(self) -> tuple[int, ...]:
        """The places of the templates that are read, 0 for the first: others have no weight."""
        weights, scales = self.weights.numpy(), self.word_scales.numpy()
        return tuple(place for place in range(len(scales)) if scales[place] or weights[place].any())
