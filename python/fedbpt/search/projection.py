"""The projection of a latent z ∈ R^d to a soft prompt: vec(P) = vec(P0) + A z (Sun et al. 2022, arXiv 2201.03514,
section 3.2).

A [n_prompt·n_embd, d] is random and fixed, N(0, (α·std(E)/(√d·σ0))²), with E the token embeddings: with z ~ N(0, σ0²·I)
the prompt then moves by α·std(E) per entry, for any d. For shifts, the size of each layer's states replaces std(E).
A and P are never sent: a seed and z are enough.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Protocol, TypedDict

import numpy as np
from msgspec import UNSET
from numpy.typing import ArrayLike, NDArray

from fedbpt.errors import InputError, TaskError
from fedbpt.machine.linear_algebra import product
from fedbpt.machine.memory import physical_memory
from fedbpt.protocol.seeding import generator
from fedbpt.protocol.specs import Placement, PromptSpec


class Embedder(Protocol):
    """The part of a model that P0 needs; a `fedbpt.engine.scorer.Scorer` satisfies it."""

    @property
    def n_vocab(self) -> int: ...

    @property
    def n_embd(self) -> int: ...

    def token_embeddings(self, ids: ArrayLike) -> NDArray[np.float32]: ...


class Projection:
    """The affine map of one `PromptSpec` for one model.

    Args:
        spec: sizes, scale and seed of A.
        p0: float32 [n_prompt, n_embd], the prompt at z = 0.
        embedding_std: standard deviation of the model's token embedding table.

    Raises:
        InputError: an invalid argument, or a matrix A that does not fit into this machine's memory.
    """

    def __init__(self, spec: PromptSpec, p0: NDArray[np.float32], embedding_std: float) -> None:
        p0 = np.array(p0, dtype=np.float32)  # a copy: the caller's array may change
        if p0.ndim != 2 or p0.shape[0] != spec.n_prompt or p0.shape[1] == 0:
            raise InputError(f"p0 must have shape [{spec.n_prompt}, n_embd], got {list(p0.shape)}", field="p0")
        if not np.isfinite(p0).all():
            raise InputError("p0 must be finite, got NaN or infinity", field="p0")
        if not (math.isfinite(embedding_std) and embedding_std > 0):
            raise InputError(f"embedding_std must be positive and finite, got {embedding_std}", field="embedding_std")
        self.spec = spec
        self.p0 = p0
        sizes = np.full(len(p0), embedding_std) if spec.shift is UNSET else np.array(spec.shift.sizes)
        if len(sizes) != len(p0):
            raise InputError(f"{len(sizes)} sizes for {len(p0)} rows: give one each", field="shift")
        self.entry_stds = spec.alpha * sizes / (math.sqrt(spec.d) * spec.sigma0)
        """Standard deviations [n_prompt] of A's entries, by row of the prompt."""
        needed = 4 * p0.size * spec.d
        memory = physical_memory()
        if needed > memory:
            raise InputError(
                f"d {spec.d} with n_prompt {spec.n_prompt} needs {needed / 1e9:,.0f} GB, this machine has "
                f"{memory / 1e9:,.0f}: use a smaller d",
                field="d",
                limit=memory,
            )

    @cached_property
    def _matrix(self) -> NDArray[np.float32]:
        """A, drawn at first use: selecting a template does not need it."""
        rng = generator(self.spec.seed, "projection")
        matrix = rng.standard_normal((self.p0.size, self.spec.d), dtype=np.float32)
        matrix *= np.repeat(self.entry_stds, self.p0.shape[1]).astype(np.float32)[:, None]
        return matrix

    def embeds(self, z: ArrayLike) -> NDArray[np.float32]:
        """Project latents ``z`` [k, d] to soft prompts float32 [k, n_prompt, n_embd]. z = 0 gives exactly p0.

        Each candidate is a separate matrix-vector product, so that its bits do not depend on the others in the call.

        Raises:
            InputError: wrong shape, NaN or infinity.
        """
        latents = np.asarray(z, dtype=np.float64)
        if latents.ndim != 2 or latents.shape[1] != self.spec.d:
            raise InputError(f"latents must have shape [k, {self.spec.d}], got {list(latents.shape)}", field="z")
        if not np.isfinite(latents).all():
            raise InputError("latents must be finite, got NaN or infinity", field="z")
        prompts = np.empty((len(latents), *self.p0.shape), dtype=np.float32)
        for prompt, latent in zip(prompts, latents, strict=True):
            # Adding zero would turn -0.0 into 0.0, but the zero latent must give p0 to the bit.
            moved = product(self._matrix, latent.astype(np.float32)) if latent.any() else None
            prompt[:] = self.p0 if moved is None else self.p0 + moved.reshape(self.p0.shape)
        return prompts

    def __repr__(self) -> str:
        n_prompt, n_embd = self.p0.shape
        return f"Projection(d={self.spec.d} -> [{n_prompt}, {n_embd}], entry_std={self.entry_stds.mean():.3g})"


def scored_as(prompt: PromptSpec) -> Placement:
    """The `Scorer`'s placement for a prompt: for it, BOS is part of the prefix or of the text."""
    return "front" if prompt.placement == "first" else prompt.placement


class Placing(TypedDict, total=False):
    """How `Scorer.compile` is told where a prompt's rows go."""

    placement: Placement
    layer: int


def placing(prompt: PromptSpec) -> Placing:
    """For `Scorer.compile`. Without a shift, as before the run's selection, a prompt that shifts has no rows."""
    layer = prompt.shifted_layer
    if prompt.shifts and prompt.shift is UNSET:
        return {"placement": "cue"}
    return {"placement": scored_as(prompt)} if layer is None else {"placement": "layer", "layer": layer}


def start_rows(model: Embedder, cue: NDArray[np.int32], prompt: PromptSpec) -> NDArray[np.float32]:
    """P0 [n_prompt, n_embd]: the embeddings of the cue's last tokens, or of random tokens in front; for shifts 0.

    Raises `TaskError` if the cue [n] is shorter than the prompt.
    """
    if prompt.shifts:
        return np.zeros((prompt.n_prompt, model.n_embd), dtype=np.float32)
    if prompt.placement != "cue":
        ids = generator(prompt.seed, "p0").integers(0, model.n_vocab, prompt.n_prompt).astype(np.int32)
        return model.token_embeddings(ids)
    if prompt.n_prompt > len(cue):
        raise TaskError(
            f"n_prompt {prompt.n_prompt} is more than the answer cue's {len(cue)} tokens: "
            f"use n_prompt {len(cue)} at most, or a template with a longer cue",
            field="n_prompt",
            limit=len(cue),
        )
    return model.token_embeddings(cue[-prompt.n_prompt :])
