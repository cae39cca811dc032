"""Robust rules, which replace the weighted mean of devices' reports if some devices may be Byzantine.

Up to f of K devices are Byzantine: they send any valid report, and may collude.

- ``median``: the median of each coordinate (Yin et al. 2018, arXiv 1803.01498, definition 1), K ≥ 2f + 1.
- ``trimmed-mean``: in each coordinate the mean without the f largest and the f smallest (definition 2), K ≥ 2f + 1.
- ``krum``: the report with the smallest sum of squared distances to its K − f − 2 nearest, K ≥ 2f + 3; multi-Krum
  keeps the K − f best of these (Blanchard et al. 2017, arXiv 1703.02757, section 4).
- ``rank``: the mean of the ranks of each device's losses: a device has one vote on the order of the candidates,
  however large its numbers (Borda count; in federated learning Mozaffari et al. 2021, arXiv 2110.04350), K ≥ 2f + 1.

All devices have the same weight, while the plain mean weights by rows: a device could claim any number of rows.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedbpt.aggregation.base import weighted_sum
from fedbpt.errors import InputError

Floats: TypeAlias = NDArray[np.float64]
Robust: TypeAlias = Literal["none", "median", "trimmed-mean", "krum", "rank"]


def reports_needed(robust: Robust, byzantine: int) -> int:
    """Fewest reports that tolerate ``byzantine`` Byzantine devices."""
    if robust == "none":
        return 1
    return 2 * byzantine + (3 if robust == "krum" else 1)


def rule_of_fits(robust: Robust) -> Robust:
    """The rule for gradients and moments of fits: rules that choose or rank whole reports become the median."""
    return robust if robust in ("none", "trimmed-mean") else "median"


def centre(rows: Floats, weights: Floats, robust: Robust, byzantine: int) -> Floats:
    """The centre [n] of the ``rows`` [K, n] of K devices; ``weights`` [K], which sum to 1, serve the plain mean only.

    Raises `InputError` for fewer rows than `reports_needed`.
    """
    n_rows = len(rows)
    needed = reports_needed(robust, byzantine)
    if n_rows < needed:
        raise InputError(
            f"robust = {robust!r} with {byzantine} Byzantine devices needs {needed} reports, got {n_rows}", limit=needed
        )
    if robust == "none":
        return weighted_sum(weights, rows)
    if robust == "median":
        middle: Floats = np.median(rows, axis=0)
        return middle
    if robust == "krum":
        return np.array(rows[krum(rows, byzantine)[0]])
    if robust == "rank":
        return _mean(ranks(rows))
    return _mean(np.sort(rows, axis=0)[byzantine : n_rows - byzantine])


def krum(rows: Floats, byzantine: int) -> NDArray[np.intp]:
    """Indices of ``rows`` [K, n] by Krum's score, best first; ties in the order of rows."""
    n_rows = len(rows)
    squares = np.array([((rows - row) ** 2).sum(axis=1) for row in rows])
    near = np.sort(squares, axis=1)[:, 1 : n_rows - byzantine - 1]  # column 0 is the row itself
    return np.argsort(near.sum(axis=1), kind="stable")


def ranks(rows: Floats) -> Floats:
    """Ranks of the entries within each of ``rows`` [K, n], from 0; equal entries share their mean rank."""
    below = (rows[:, None, :] < rows[:, :, None]).sum(axis=2)
    ties = (rows[:, None, :] == rows[:, :, None]).sum(axis=2)
    return np.asarray(below + (ties - 1) / 2)


def _mean(rows: Floats) -> Floats:
    return weighted_sum(np.full(len(rows), 1 / len(rows)), rows)
