"""Candidates of a search, drawn from its state, a seed and a generation, identically on all machines."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedbpt.errors import InputError
from fedbpt.protocol.rounds import SearchState
from fedbpt.protocol.seeding import generator

Floats: TypeAlias = NDArray[np.float64]


def sample_population(state: SearchState, popsize: int, seed: int, generation: int) -> Floats:
    """Draw candidates float64 [popsize, d] = mean + σ·(√C·n), n from ``generator(seed, "population", generation)``.

    Coordinator and devices draw identical candidates: only elementwise operations are used, which IEEE 754 defines to
    the bit, and no BLAS, LAPACK or eigenvectors. The normals are rounded to float32, which hides last-bit differences
    between C libraries' logarithms. The first rows do not depend on ``popsize``. With a ``step`` in the state, the
    first two candidates are mean ± σ·step instead.

    Raises:
        InputError: ``popsize`` < 1, inconsistent shapes in the state, scales that are not positive, or a covariance
            that is not positive definite.
    """
    if popsize < 1:
        raise InputError(f"popsize must be at least 1, got {popsize}", field="popsize")
    mean = state.mean.numpy()
    if mean.ndim != 1 or len(mean) == 0:
        raise InputError(f"a search state's mean must have shape [d], got {list(mean.shape)}", field="mean")
    rng = generator(seed, "population", generation)
    normals = rng.standard_normal((popsize, len(mean))).astype(np.float32).astype(np.float64)
    moves = transform(state, normals)
    if state.step is not None:
        step = state.step.numpy()
        if step.shape != mean.shape:
            raise InputError(
                f"a search state's step must have shape [{len(mean)}], got {list(step.shape)}", field="step"
            )
        moves[:2] = np.stack([step, -step])[:popsize]
    return np.asarray(mean + state.sigma * moves)


def transform(state: SearchState, normals: Floats) -> Floats:
    """√C·n for each row n of ``normals`` [k, d]: by the scales, the Cholesky factor, or unchanged if C = I."""
    d = len(state.mean.numpy())
    if state.scales is not None and state.covariance is not None:
        raise InputError("a search state must have scales or a covariance, not both", field="covariance")
    if state.scales is not None:
        scales = state.scales.numpy()
        if scales.shape != (d,) or not (scales > 0).all():
            raise InputError(f"a search state's scales must be {d} positive numbers", field="scales")
        return scales * normals
    if state.covariance is not None:
        covariance = state.covariance.numpy()
        if covariance.shape != (d, d):
            raise InputError(
                f"a search state's covariance must have shape [{d}, {d}], got {list(covariance.shape)}",
                field="covariance",
            )
        return _lower_times(cholesky(covariance), normals)
    return np.array(normals)


def cholesky(covariance: Floats) -> Floats:
    """The lower triangular L [d, d] with L·Lᵀ = ``covariance``, of which only the lower triangle is used.

    Unlike LAPACK's, its last bits are the same on all machines: it uses only elementwise operations. O(d³)
    multiplications in d numpy calls: 0.1 s at d = 500.

    Raises:
        InputError: not positive definite.
    """
    rest = np.tril(covariance)
    factor = np.zeros_like(rest)
    for j in range(len(rest)):
        pivot = rest[j, j]
        if not pivot > 0:
            raise InputError(
                f"a search state's covariance must be positive definite, pivot {j} is {pivot:.3g}", field="covariance"
            )
        column = rest[j:, j] / np.sqrt(pivot)
        factor[j:, j] = column
        rest[j + 1 :, j + 1 :] -= column[1:, None] * column[None, 1:]
    return factor


def _lower_times(factor: Floats, normals: Floats) -> Floats:
    """``normals`` @ ``factor``ᵀ, summed column by column in a fixed order."""
    product = np.zeros_like(normals)
    for j in range(len(factor)):
        product[:, j:] += normals[:, j, None] * factor[None, j:, j]
    return product
