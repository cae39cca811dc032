"""Losses of label logits: cross-entropy and hinge over the label words."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedbpt.errors import InputError
from fedbpt.protocol.specs import LossName

MAX_RATIO = 1e6
"""Upper bound of the perturbed ratio."""

_SMALLEST_LOSS = 1e-12  # a hinge loss may be 0: avoids division by it

HINGE_MARGIN = 2.0
"""Margin of the hinge loss, as in Black-Box Tuning (arXiv 2201.03514)."""


def log_probabilities(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-softmax of logits [..., n_labels] over the last axis; [..., 0] stays empty."""
    if not logits.shape[-1]:
        return logits
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def cross_entropy(logits: ArrayLike, targets: ArrayLike) -> NDArray[np.float64]:
    """−log p(target) in nats, p over the label words only: logits [..., n, n_labels], targets [n] → [..., n]."""
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
    """F = L(z; D) / L(z; D̃), elementwise, at most `MAX_RATIO` (Sun et al. 2023, arXiv 2310.01467, section 3.3)."""
    return np.minimum(np.asarray(losses) / np.maximum(perturbed, _SMALLEST_LOSS), MAX_RATIO)


def balanced_weights(counts: ArrayLike) -> NDArray[np.float64]:
    """Row weights [n_labels] that give each label the same total weight: n / (K·n_label).

    ``counts`` [n_labels] are the rows of each label, n in total, K labels having any. The mean weight of a row is 1.
    A label without rows has weight 1, since a device that was not counted may have some.
    """
    rows = np.asarray(counts, dtype=np.float64)
    if rows.ndim != 1 or not (rows >= 0).all() or not rows.any():
        raise InputError(f"label counts must be a list of row counts, not all 0, got {rows.tolist()}", field="counts")
    weights = np.ones(len(rows))
    present = rows > 0
    weights[present] = rows.sum() / (present.sum() * rows[present])
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
            f"logits must have shape [..., n, n_labels] and targets [n], got {list(values.shape)} and "
            f"{list(index.shape)}",
            field="targets",
        )
    if index.size and not (index.min() >= 0 and index.max() < values.shape[-1]):
        raise InputError(f"targets must be from 0 to {values.shape[-1] - 1}", field="targets")
    return values, index


def _at(values: NDArray[np.float64], index: NDArray[np.intp]) -> NDArray[np.float64]:
    """Select values[..., i, index[i]]."""
    return values[..., np.arange(len(index)), index]
