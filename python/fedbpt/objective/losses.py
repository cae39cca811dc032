"""How bad label logits are: cross-entropy or hinge over the label words."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedbpt.errors import InputError
from fedbpt.protocol.specs import LossName

MAX_RATIO = 1e6
"""Largest perturbed ratio: what is larger is equally bad."""

_SMALLEST_LOSS = 1e-12  # a perturbed loss of zero (hinge) must not divide

HINGE_MARGIN = 2.0
"""Margin of the hinge loss, as in Black-Box Tuning (arXiv 2201.03514)."""


def cross_entropy(logits: ArrayLike, targets: ArrayLike) -> NDArray[np.float64]:
    """−log p(target) in nats, over the label words alone: logits [..., n, n_labels], targets [n] → [..., n]."""
    values, index = _checked(logits, targets)
    shifted = values - values.max(axis=-1, keepdims=True)
    losses: NDArray[np.float64] = np.log(np.exp(shifted).sum(axis=-1)) - _at(shifted, index)
    return losses


def hinge(logits: ArrayLike, targets: ArrayLike, margin: float = HINGE_MARGIN) -> NDArray[np.float64]:
    """Σ over wrong labels j of max(0, margin + logit_j − logit_target): logits [..., n, n_labels] → [..., n]."""
    values, index = _checked(logits, targets)
    over = np.maximum(0.0, values - _at(values, index)[..., None] + margin)
    losses: NDArray[np.float64] = over.sum(axis=-1) - margin  # the target's own term is the margin
    return losses


def perturbed_ratio(losses: ArrayLike, perturbed: ArrayLike) -> NDArray[np.float64]:
    """F = L(z; D) / L(z; D̃), elementwise, `MAX_RATIO` at most (Sun et al. 2023, arXiv 2310.01467, section 3.3)."""
    return np.minimum(np.asarray(losses) / np.maximum(perturbed, _SMALLEST_LOSS), MAX_RATIO)


def balanced_weights(counts: ArrayLike) -> NDArray[np.float64]:
    """Weights [n_labels] of a row's loss by which each label that has rows counts alike: n/(K·n_label).

    ``counts`` [n_labels] are rows of each label, n in all, K labels having some. The mean weight of a row is 1. A label
    without a row has weight 1: a device that was not counted may have some.
    """
    rows = np.asarray(counts, dtype=np.float64)
    if rows.ndim != 1 or not (rows >= 0).all() or not rows.any():
        raise InputError(f"label counts must be a list of numbers of rows, not all 0, got {rows.tolist()}")
    weights = np.ones(len(rows))
    there = rows > 0
    weights[there] = rows.sum() / (there.sum() * rows[there])
    return weights


LOSSES: Mapping[LossName, Callable[[ArrayLike, ArrayLike], NDArray[np.float64]]] = {
    "cross_entropy": cross_entropy,
    "hinge": hinge,
}


def _checked(logits: ArrayLike, targets: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    values = np.asarray(logits, dtype=np.float64)
    index = np.asarray(targets, dtype=np.intp)
    if values.ndim < 2 or index.shape != (values.shape[-2],):
        raise InputError(
            f"logits [..., n, n_labels] and targets [n] disagree: {list(values.shape)}, {list(index.shape)}"
        )
    if index.size and not (index.min() >= 0 and index.max() < values.shape[-1]):
        raise InputError(f"targets must lie in 0..{values.shape[-1] - 1}")
    return values, index


def _at(values: NDArray[np.float64], index: NDArray[np.intp]) -> NDArray[np.float64]:
    """values[..., i, index[i]]."""
    return values[..., np.arange(len(index)), index]
