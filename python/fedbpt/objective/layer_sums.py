"""What a device computes for the fit of a `LayerReadout`: sums of its rows' states, and their losses."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from fedbpt.engine.discriminant import SMOOTHING, FoldSums, fold_sums, sketching
from fedbpt.errors import InputError
from fedbpt.machine.linear_algebra import one_blas_thread, product
from fedbpt.objective.layer_view import Views
from fedbpt.objective.losses import log_probabilities
from fedbpt.protocol.rounds import CrossResult, CrossWork, SketchResult, SketchWork, SumsResult, SumsWork
from fedbpt.protocol.specs import Array, Quantized

Floats = NDArray[np.float64]


def sums_result(
    work: SumsWork, views: Views, targets: NDArray[np.intp], folds: NDArray[np.intp], n_labels: int
) -> SumsResult:
    """Sum up the rows of a device: label indices [n] and folds [n] of the rows of ``views``."""
    reading = work.reading
    centres = []
    means = []
    factors = []
    rests = []
    by_fold: list[FoldSums] = []
    for place in range(reading.n_readers):
        states = views.reader(place)
        centre = states.mean(axis=0).astype(np.float32).astype(np.float64)
        by_fold = [
            fold_sums(states[folds == fold] - centre, targets[folds == fold], n_labels, work.max_rank)
            for fold in range(reading.n_folds)
        ]
        centres.append(centre)
        means.append(np.concatenate([each.means for each in by_fold]))
        factors.append(np.concatenate([each.factor for each in by_fold]))
        rests.append(np.stack([each.rest for each in by_fold]))
    left_out = np.stack(rests)
    return SumsResult(
        purpose=work.purpose,
        loss=word_loss(views, targets, n_labels),
        counts=tuple(tuple(each.counts.tolist()) for each in by_fold),
        ranks=tuple(len(each.factor) for each in by_fold),
        centres=Array.of(np.stack(centres), "<f4"),
        means=Quantized.of(np.stack(means)),
        factors=Quantized.of(np.stack(factors)),
        rests=Array.of(left_out if left_out.any() else left_out[:, :0], "<f4"),  # sums of squares overflow <f2
        word_means=Array.of(views.words.mean(axis=0), "<f4"),
    )


def sketch_result(
    work: SketchWork, views: Views, targets: NDArray[np.intp], folds: NDArray[np.intp], n_labels: int, seed: int
) -> SketchResult:
    """Sum up the rows of a device: label indices [n] and folds [n] of the rows of ``views``."""
    reading = work.reading
    matrix = sketching(views.states.shape[3], work.rank, seed)
    places = folds * n_labels + targets  # of a fold's label
    one_hot = (places == np.arange(reading.n_folds * n_labels)[:, None]).astype(np.float64)
    sums = []
    squares = []
    sketches = []
    for place in range(reading.n_readers):
        states = views.reader(place)
        sums.append(product(one_hot, states).reshape(reading.n_folds, n_labels, -1))
        of_folds = [states[folds == fold] for fold in range(reading.n_folds)]
        squares.append(np.stack([(own**2).sum(axis=0) for own in of_folds]))
        sketches.append(np.stack([product(own.T, product(own, matrix)) for own in of_folds]))
    return SketchResult(
        purpose=work.purpose,
        loss=word_loss(views, targets, n_labels),
        counts=Array.of(one_hot.sum(axis=1).reshape(reading.n_folds, n_labels)),
        sums=Array.of(np.stack(sums)),
        squares=Array.of(np.stack(squares)),
        sketches=Array.of(np.stack(sketches)),
        word_means=Array.of(views.words.mean(axis=0)),
    )


def word_loss(views: Views, targets: NDArray[np.intp], n_labels: int) -> float:
    """Mean loss of the label words in the first view; without them, of all labels alike, nats."""
    if not views.words.size:
        return float(np.log(n_labels))
    return float(-views.words[np.arange(len(targets)), 0, targets].mean())


def cross_result(
    work: CrossWork,
    views: Views,
    targets: NDArray[np.intp],
    folds: NDArray[np.intp],
    row_weights: Floats,
) -> CrossResult:
    """The losses of a device's rows under the mixtures of ``work``. Raises `InputError` if its shapes disagree."""
    reading = work.reading
    coefficients = work.coefficients.numpy()
    word_scales = work.word_scales.numpy()
    weights = work.weights.numpy()
    biases = work.biases.numpy()
    n_columns = len(work.readers)
    _check_shapes(work, views, int(targets.max(initial=0)))
    logits = np.zeros((n_columns, len(targets), weights.shape[-1]))
    for column, reader in enumerate(work.readers):
        states = views.reader(reader)
        for fold in range(reading.n_folds):
            own = folds == fold
            logits[column, own] = product(states[own], weights[fold, column]) + biases[fold, column]
    words = np.moveaxis(views.words, 1, 0) - work.centres.numpy()[:, None] if views.words.size else None
    rows = np.arange(len(targets))
    sums = np.zeros((len(coefficients), reading.n_folds))
    for mixture, (factors, scales) in enumerate(zip(coefficients, word_scales, strict=True)):
        mixed = _mixed(factors[factors != 0], logits[factors != 0])
        if words is not None and scales.any():
            mixed = mixed + _mixed(scales, words)
        log_p = log_probabilities(np.broadcast_to(mixed, logits.shape[1:]))
        smoothed = (1 - SMOOTHING) * log_p[rows, targets] + SMOOTHING * log_p.mean(axis=1)
        losses = -row_weights * smoothed
        sums[mixture] = np.bincount(folds, losses, minlength=reading.n_folds)
    return CrossResult(purpose=work.purpose, loss_sums=Array.of(sums, "<f4"))


_mixed = one_blas_thread(partial(np.tensordot, axes=1))
"""The sum of arrays [k, …] by their factors [k]."""


def _check_shapes(work: CrossWork, views: Views, last_label: int) -> None:
    """Raise `InputError` unless the arrays of ``work`` fit each other and ``views``."""
    n_readers = views.states.shape[1] * views.states.shape[2]
    if max(work.readers, default=0) >= n_readers:
        raise InputError(
            f"readers must be below {n_readers}, got {max(work.readers)}", field="readers", limit=n_readers
        )
    n_labels = views.words.shape[2] if views.words.size else max(work.weights.shape[-1:], default=0)
    n_mixtures = max(work.coefficients.shape[:1], default=0)
    n_columns, n_views = len(work.readers), views.words.shape[1]
    for field, expected in (
        ("weights", (work.reading.n_folds, n_columns, views.states.shape[3], max(n_labels, last_label + 1))),
        ("biases", (work.reading.n_folds, n_columns, n_labels)),
        ("coefficients", (n_mixtures, n_columns)),
        ("word_scales", (n_mixtures, n_views)),
        ("centres", (n_views, n_labels)),
    ):
        found = getattr(work, field).shape
        if found != expected:
            raise InputError(f"{field} must have shape {list(expected)}, got {list(found)}", field=field)
