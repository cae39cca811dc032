"""Token corruption for FedBPT's perturbed objective (Sun et al. 2023, arXiv 2310.01467, section 3.3)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedbpt.argument_types import array_of, checked
from fedbpt.errors import InputError


@checked
def perturb(ids: ArrayLike, keep_tail: int, rate: float, n_vocab: int, rng: np.random.Generator) -> NDArray[np.int32]:
    """Copy ``ids`` [n], replacing each token with a uniformly random one with probability ``rate``.

    The last ``keep_tail`` tokens (the answer cue) never change. A random token may equal the one that it replaces.

    Raises:
        InputError: ``rate`` outside [0, 1], negative counts, or ``n_vocab`` < 1.
    """
    tokens = array_of(ids, np.int32, "ids")
    if tokens.ndim != 1:
        raise InputError(f"ids must be one-dimensional, got shape {list(tokens.shape)}", field="ids")
    if not 0 <= rate <= 1:
        raise InputError(f"rate must be between 0 and 1, got {rate}", field="rate")
    if keep_tail < 0:
        raise InputError(f"keep_tail must be 0 or more, got {keep_tail}", field="keep_tail")
    if not 0 < n_vocab < 2**31:
        raise InputError(f"n_vocab must be from 1 to 2^31 - 1, got {n_vocab}", field="n_vocab")
    chosen = rng.random(len(tokens)) < rate
    chosen[max(len(tokens) - keep_tail, 0) :] = False
    random = rng.integers(0, n_vocab, size=len(tokens), dtype=np.int32)
    return np.where(chosen, random, tokens)
