"""What a device computes for a logistic regression on hidden states: their moments, and gradients of its loss."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedbpt.errors import InputError
from fedbpt.machine.linear_algebra import product
from fedbpt.objective.layer_sums import word_loss
from fedbpt.objective.layer_view import Views
from fedbpt.objective.losses import log_probabilities
from fedbpt.protocol.rounds import LogisticResult, LogisticWork, MomentsResult, MomentsWork
from fedbpt.protocol.specs import Array

Floats = NDArray[np.float64]

HELD_FOLD = 0
"""The fold that the second point is fitted without."""


def moments_result(work: MomentsWork, views: Views, targets: NDArray[np.intp], n_labels: int) -> MomentsResult:
    """The moments of a device's rows, with label indices [n]."""
    states = views.states.astype(np.float64)
    word_means = views.words.mean(axis=0)
    word_squares = ((views.words - word_means) ** 2).mean(axis=(0, 2)) if views.words.size else np.zeros(0)
    return MomentsResult(
        purpose=work.purpose,
        loss=word_loss(views, targets, n_labels),
        means=Array.of(states.mean(axis=0), "<f4"),
        squares=Array.of((states**2).mean(axis=0), "<f4"),
        word_means=Array.of(word_means, "<f4"),
        word_squares=Array.of(word_squares, "<f4"),
    )


def logistic_result(
    work: LogisticWork, views: Views, targets: NDArray[np.intp], folds: NDArray[np.intp], row_weights: Floats
) -> LogisticResult:
    """The losses of a device's rows and their gradients at the points of ``work``.

    Args:
        targets, folds: label index and fold of each row [n].
        row_weights: of the rows' losses [n].

    Raises `InputError` if the shapes of ``work`` disagree.
    """
    weights, scales, bias = (array.numpy() for array in (work.weights, work.word_scales, work.bias))
    n_labels = _check_shapes(work, views, int(targets.max(initial=0)))
    states = (views.states - work.centre.numpy()).reshape(len(targets), -1)
    words = views.words - work.word_centre.numpy() if views.words.size else np.zeros((len(targets), 0, n_labels))
    losses = []
    gradients: list[tuple[Floats, Floats, Floats]] = []
    for point in range(len(bias)):
        own = folds != HELD_FOLD if point else np.ones(len(targets), dtype=bool)
        if not own.any():  # a device with few rows may have them all in one fold
            own[:] = True
        x, s, target, row_weight = states[own], words[own], targets[own], row_weights[own]
        logits = (
            bias[point] + product(x, weights[point].reshape(-1, n_labels)) + np.einsum("v,nvk->nk", scales[point], s)
        )
        log_p = log_probabilities(logits)
        losses.append(float(-(row_weight * log_p[np.arange(len(target)), target]).mean()))
        by_logits = np.exp(log_p)
        by_logits[np.arange(len(target)), target] -= 1.0
        by_logits *= row_weight[:, None] / len(target)
        by_weights = product(x.T, by_logits).reshape(weights.shape[1:])
        gradients.append((by_weights, np.einsum("nk,nvk->v", by_logits, s), by_logits.sum(axis=0)))
    by_weights, by_scales, by_bias = (np.stack(each) for each in zip(*gradients, strict=True))
    return LogisticResult(
        purpose=work.purpose,
        losses=Array.of(np.array(losses), "<f4"),
        by_weights=Array.of(by_weights, "<f2"),
        by_word_scales=Array.of(by_scales, "<f4"),
        by_bias=Array.of(by_bias, "<f4"),
    )


def _check_shapes(work: LogisticWork, views: Views, last_label: int) -> int:
    """The number of labels. Raise `InputError` unless the arrays of ``work`` fit each other and ``views``."""
    n_points, n_labels = max(work.bias.shape[:1], default=0), max(work.bias.shape[1:], default=0)
    n_labels = max(n_labels, last_label + 1)
    n_word_views = views.words.shape[1]
    for field, expected in (
        ("bias", (max(n_points, 1), n_labels)),
        ("weights", (n_points, *views.states.shape[1:], n_labels)),
        ("word_scales", (n_points, n_word_views)),
        ("centre", views.states.shape[1:]),
        ("word_centre", (n_word_views, n_labels if n_word_views else 0)),
    ):
        found = getattr(work, field).shape
        if found != expected:
            raise InputError(f"{field} must have shape {list(expected)}, got {list(found)}", field=field)
    return n_labels
