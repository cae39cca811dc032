"""From a latent z ∈ R^d to a soft prompt: vec(P) = vec(P0) + A z (Sun et al. 2022, arXiv 2201.03514, section 3.2).

A [n_prompt·n_embd, d] is random and fixed, N(0, (α·std(E)/(√d·σ0))²), E the token embeddings: with z ~ N(0, σ0²·I)
the prompt then moves by α·std(E) per entry, whatever d is. Nobody sends A or P: the seed and z do.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedbpt.errors import InputError, TaskError
from fedbpt.machine.memory import physical_memory
from fedbpt.protocol.seeding import generator
from fedbpt.protocol.specs import Placement, PromptSpec


class Embedder(Protocol):
    """What P0 takes of a model; a `fedbpt.engine.scorer.Scorer` satisfies it."""

    @property
    def n_vocab(self) -> int: ...

    def token_embeddings(self, ids: ArrayLike) -> NDArray[np.float32]: ...


class Projection:
    """The affine map of one `PromptSpec` for one model.

    Args:
        spec: sizes, scale and seed of A.
        p0: float32 [n_prompt, n_embd], the prompt at z = 0.
        embedding_std: standard deviation of the model's token embedding table.
    """

    def __init__(self, spec: PromptSpec, p0: NDArray[np.float32], embedding_std: float) -> None:
        p0 = np.array(p0, dtype=np.float32)  # a copy: the caller's array may change
        if p0.ndim != 2 or p0.shape[0] != spec.n_prompt or p0.shape[1] == 0:
            raise InputError(f"p0 must have shape [{spec.n_prompt}, n_embd], got {list(p0.shape)}")
        if not np.isfinite(p0).all():
            raise InputError("p0 holds NaN or infinity")
        if not (math.isfinite(embedding_std) and embedding_std > 0):
            raise InputError(f"embedding_std must be positive and finite, got {embedding_std}")
        self.spec = spec
        self.p0 = p0
        self.entry_std = spec.alpha * embedding_std / (math.sqrt(spec.d) * spec.sigma0)
        """Standard deviation of A's entries."""
        if 4 * p0.size * spec.d > (memory := physical_memory()):
            raise InputError(
                f"d {spec.d} with n_prompt {spec.n_prompt} takes {4 * p0.size * spec.d / 1e9:,.0f} GB, this machine "
                f"has {memory / 1e9:,.0f}: use a smaller d"
            )

    @cached_property
    def _matrix(self) -> NDArray[np.float32]:
        """A, drawn at its first use: to choose among templates takes none."""
        rng = generator(self.spec.seed, "projection")
        matrix = rng.standard_normal((self.p0.size, self.spec.d), dtype=np.float32)
        matrix *= np.float32(self.entry_std)
        return matrix

    def embeds(self, z: ArrayLike) -> NDArray[np.float32]:
        """Soft prompts float32 [k, n_prompt, n_embd] of latents ``z`` [k, d]. z = 0 gives exactly p0.

        Each candidate is a matrix-vector product of its own, so that its bits do not depend on how many others
        are asked for in the same call.

        Raises:
            InputError: wrong shape, NaN or infinity.
        """
        latents = np.asarray(z, dtype=np.float64)
        if latents.ndim != 2 or latents.shape[1] != self.spec.d:
            raise InputError(f"latents must have shape [k, {self.spec.d}], got {list(latents.shape)}")
        if not np.isfinite(latents).all():
            raise InputError("latents hold NaN or infinity")
        prompts = np.empty((len(latents), *self.p0.shape), dtype=np.float32)
        for prompt, latent in zip(prompts, latents, strict=True):
            # Adding zero would turn -0.0 into 0.0: the zero latent is p0 to the bit.
            moved = self._matrix @ latent.astype(np.float32) if latent.any() else None
            prompt[:] = self.p0 if moved is None else self.p0 + moved.reshape(self.p0.shape)
        return prompts

    def __repr__(self) -> str:
        n_prompt, n_embd = self.p0.shape
        return f"Projection(d={self.spec.d} -> [{n_prompt}, {n_embd}], entry_std={self.entry_std:.3g})"


def scored_as(prompt: PromptSpec) -> Placement:
    """What a `Scorer` calls the prompt's place: there BOS is part of the prefix, or of the text."""
    return "cue" if prompt.placement == "cue" else "front"


def start_rows(model: Embedder, cue: NDArray[np.int32], prompt: PromptSpec) -> NDArray[np.float32]:
    """P0 [n_prompt, n_embd]: the cue's own last embeddings, or random tokens' in front of the text.

    Raises `TaskError` for a cue [n] that is shorter than the prompt.
    """
    if prompt.placement != "cue":
        ids = generator(prompt.seed, "p0").integers(0, model.n_vocab, prompt.n_prompt).astype(np.int32)
        return model.token_embeddings(ids)
    if prompt.n_prompt > len(cue):
        raise TaskError(
            f"n_prompt {prompt.n_prompt} is more than the answer cue's {len(cue)} tokens: "
            f"use n_prompt {len(cue)} at most, or a template with a longer cue"
        )
    return model.token_embeddings(cue[-prompt.n_prompt :])
