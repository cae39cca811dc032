"""What messages are made of, and the specs of a prompt and its objective.

Plain data only: msgspec structs, strict on decode (``forbid_unknown_fields``), arrays as little-endian bytes
with shape and dtype.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbpt import quantities
from fedbpt.argument_types import StructMeta, check_fields
from fedbpt.errors import WireError
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


class CheckedMessage(Message, frozen=True, metaclass=StructMeta):
    """Base of what people make, too: a field of the wrong kind or name raises `ConfigError` where it is made."""

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
