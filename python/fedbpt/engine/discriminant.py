"""Regularised linear discriminant analysis (LDA) of hidden states, from sums that add up over devices.

With x a row's state over its root mean square, standardised per dimension by the pooled moments, μ_k the mean of label
k, and S the pooled within-label covariance [E, E] (Friedman 1989, JASA 84; Hastie, Tibshirani & Friedman 2009, 4.3):

    S_λ = (1−λ)·S + λ·(tr S / E)·I,    logit_k = μ_kᵀ S_λ⁻¹ x − ½ μ_kᵀ S_λ⁻¹ μ_k + log prior_k

It needs no gradient and no exchange beyond one: a device's sums, pooled, give the same logits as all rows in one place.
A device sums up each fold of its rows apart, so that a classifier without a fold can be judged on it: cross-validation
over all devices, however skewed their labels.

A device's sums of squares are a matrix of at most n rows of length E (a factor R with RᵀR = Σ (x−μ)(x−μ)ᵀ), from
the singular value decomposition of its rows: fewer numbers than Σxxᵀ where a device has fewer rows than dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedbpt.machine.linear_algebra import one_blas_thread
from fedbpt.protocol.seeding import generator

Floats = NDArray[np.float64]

_SMALLEST_VARIANCE = 1e-4  # of a dimension, as a share of their mean: constant ones are not blown up
_SMALLEST_WITHIN = 1e-3  # mean variance within labels, as a share of all: with a row a label there is none
_SMALLEST_SKETCHED = 1e-6  # eigenvalue, as a share of the largest: below it there is only rounding
_LARGEST_WEIGHT = 1e4  # of a classifier, which is sent in half precision; it is too sure there anyway


SMOOTHING: Final = 0.02
"""Weight of the uniform distribution in the targets of a fit's losses.

Where few rows are read without an error, the largest scale of the logits would win, and be wrong by many nats later.
"""


class FoldSums(NamedTuple):
    """Sums over the rows of one fold on one device; of a single layer under a single template.

    Attributes:
        counts: rows of each label [K].
        means: mean state of each label that has rows [n_present, E], in label order.
        factor: [rank, E], whose Gram matrix over rows is the scatter within labels, up to ``rest``.
        rest: diagonal [E] of the scatter that ``factor`` leaves out.
    """

    counts: NDArray[np.int64] | Floats
    means: Floats
    factor: Floats
    rest: Floats


class Discriminant(NamedTuple):
    """Logits x·weights + bias: weights [E, K], bias [K]."""

    weights: Floats
    bias: Floats


LARGEST_SKETCH: Final = 1.5
"""Bound of the norm of a column of `sketching`."""


def sketching(n_embd: int, rank: int, seed: int) -> Floats:
    """A random matrix [n_embd, rank] whose columns have norms of about 1."""
    found: Floats = generator(seed, "sketch").standard_normal((n_embd, rank)) / np.sqrt(n_embd)
    found *= np.minimum(1.0, LARGEST_SKETCH / np.linalg.norm(found, axis=0))
    return found


def assign_folds(targets: NDArray[np.intp], n_folds: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """A fold [n] for each row, at random, so that each fold has as many rows of a label as the others, ±1."""
    folds = np.zeros(len(targets), dtype=np.intp)
    first = 1  # a device with a few rows has none in fold 0
    for label in np.unique(targets):
        rows = rng.permutation(np.flatnonzero(targets == label))
        folds[rows] = (first + np.arange(len(rows))) % n_folds
        first += len(rows)  # else devices with a few rows a label would have them all in the first folds
    return folds


@one_blas_thread
def fold_sums(states: Floats, targets: NDArray[np.intp], n_labels: int, max_rank: int) -> FoldSums:
    """Sum up the rows of a fold: states [n, E], label indices [n]. The factor has at most ``max_rank`` rows."""
    counts = np.bincount(targets, minlength=n_labels).astype(np.int64)
    present = np.flatnonzero(counts)
    means = np.stack([states[targets == label].mean(axis=0) for label in present]) if len(present) else states[:0]
    place = np.cumsum(counts > 0) - 1
    centred = states - means[place[targets]]
    rank = len(states) - len(present)
    _, values, vectors = np.linalg.svd(centred, full_matrices=False) if rank else (None, np.zeros(0), states[:0])
    factor = values[:rank, None] * vectors[:rank]
    return FoldSums(counts, means, factor[:max_rank], (factor[max_rank:] ** 2).sum(axis=0))


@one_blas_thread
def sketched_sums(counts: Floats, sums: Floats, squares: Floats, sketch: Floats, matrix: Floats) -> FoldSums:
    """The same from numbers that add up over devices, where G = Σxxᵀ is known by a sketch.

    G = C·(ΨᵀC)⁺·Cᵀ with C = GΨ (Nyström; Tropp et al. 2017, arXiv 1706.05736), exactly if Ψ has a column for each row.
    The part of the variances that is lost otherwise becomes ``rest``.

    Args:
        counts: rows of each label [K].
        sums: of their states [K, E].
        squares: of all states, the diagonal of G [E].
        sketch: C [E, rank].
        matrix: Ψ [E, rank], see `sketching`.
    """
    present = counts > 1e-3
    means = sums[present] / counts[present, None]
    core = matrix.T @ sketch
    values, vectors = np.linalg.eigh((core + core.T) / 2)
    kept = values > _SMALLEST_SKETCHED * values.max(initial=1e-30)
    total = sketch @ (vectors[:, kept] / np.sqrt(values[kept]))  # [E, rank], whose Gram matrix over columns is G
    between = (np.sqrt(counts[present])[:, None] * means).T
    basis, _ = np.linalg.qr(np.concatenate([total, between], axis=1))
    of_total, of_between = basis.T @ total, basis.T @ between
    within = of_total @ of_total.T - of_between @ of_between.T
    values, vectors = np.linalg.eigh((within + within.T) / 2)
    positive = values > _SMALLEST_SKETCHED * values.max(initial=1e-30)
    factor = (np.sqrt(values[positive])[:, None] * vectors[:, positive].T) @ basis.T
    rest = np.maximum(squares - (between**2).sum(axis=1) - (factor**2).sum(axis=0), 0.0)
    return FoldSums(np.where(present, counts, 0.0), means, factor, rest)


class Pooled(NamedTuple):
    """Sums over folds and devices: weight of the rows of each label [K], their means [K, E], `FoldSums` of all."""

    counts: Floats
    means: Floats
    factor: Floats
    rest: Floats


def pool(parts: Sequence[tuple[FoldSums, float]]) -> Pooled:
    """Pool the sums of folds and devices, each with the weight of one of its rows."""
    n_labels = len(parts[0][0].counts)
    size = len(parts[0][0].rest)
    counts = np.zeros(n_labels)
    totals = np.zeros((n_labels, size))
    for sums, weight in parts:
        counts += weight * sums.counts
        totals[sums.counts > 0] += weight * sums.counts[sums.counts > 0, None] * sums.means
    means = totals / np.where(counts > 0, counts, 1.0)[:, None]
    factors = []
    rest = np.zeros(size)
    for sums, weight in parts:
        present = sums.counts > 0
        # Within the pool, a part's rows also vary by the distance of its means from the pooled ones.
        apart = np.sqrt(sums.counts[present])[:, None] * (sums.means - means[present])
        factors += [np.sqrt(weight) * sums.factor, np.sqrt(weight) * apart]
        rest += weight * sums.rest
    return Pooled(counts, means, np.concatenate(factors), rest)


@one_blas_thread
def discriminants(pooled: Pooled, shrinkages: Sequence[float], uniform: bool = False) -> list[Discriminant]:
    """The classifier of each λ in ``shrinkages``, for states that are not standardised.

    ``uniform``: all labels have the same prior; else their share of the rows, and a label without rows half a row. Such
    a label has the mean of all rows. Without any row, all labels are equally likely. Weights beyond `_LARGEST_WEIGHT`
    shrink, with the bias: only the temperature changes, which is fitted afterwards.
    """
    counts, factor = pooled.counts, pooled.factor
    size = pooled.means.shape[1]
    total = counts.sum()
    if not total:
        return [Discriminant(np.zeros((size, len(counts))), np.zeros(len(counts)))] * len(shrinkages)
    seen = counts > 0
    centre = counts @ pooled.means / total
    within = (factor**2).sum(axis=0) + pooled.rest
    variance = (within + counts @ (pooled.means - centre) ** 2) / total
    scale = 1.0 / np.sqrt(variance + _SMALLEST_VARIANCE * variance.mean() + 1e-30)
    freedom = max(total - seen.sum(), 1.0)
    rows = factor * (scale / np.sqrt(freedom))
    diagonal = pooled.rest * scale**2 / freedom
    means = np.where(seen[:, None], (pooled.means - centre) * scale, 0.0)
    mean_variance = max(((rows**2).sum() + diagonal.sum()) / size, _SMALLEST_WITHIN)
    prior = np.zeros(len(counts)) if uniform else np.log(counts + 0.5)
    found = []
    solve = _solver(rows, diagonal, means.T)
    for shrinkage in shrinkages:
        solved = solve(1 - shrinkage, shrinkage * mean_variance)
        bias = prior - prior.max() - 0.5 * (means.T * solved).sum(axis=0)
        weights = scale[:, None] * solved
        bias -= centre @ weights
        softer = min(1.0, _LARGEST_WEIGHT / max(np.abs(weights).max(), 1e-30))
        found.append(Discriminant(softer * weights, softer * bias))
    return found


def _solver(rows: Floats, diagonal: Floats, right: Floats) -> Callable[[float, float], Floats]:
    """(a, b) to (a·(rowsᵀ·rows + diag(diagonal)) + b·1)⁻¹·right, for several a and b > 0.

    By Woodbury's identity where there are fewer rows than columns.
    """
    if len(rows) >= rows.shape[1]:
        full = rows.T @ rows + np.diag(diagonal)
        one = np.eye(len(full))
        return lambda a, b: np.linalg.solve(a * full + b * one, right)

    def few(a: float, b: float) -> Floats:
        positive = a * diagonal + b
        scaled = rows / positive
        inner = np.eye(len(rows)) + a * (scaled @ rows.T)
        found: Floats = right / positive[:, None] - a * (scaled.T @ np.linalg.solve(inner, scaled @ right))
        return found

    return few
