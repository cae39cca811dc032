"""What takes the place of the weighted mean of devices' reports where some devices may lie.

Up to f of K devices are Byzantine: they send anything that a report may hold, and may agree among themselves.

- ``median``: the median of each coordinate (Yin et al. 2018, arXiv 1803.01498, definition 1), K ≥ 2f + 1.
- ``trimmed-mean``: in each coordinate the mean without the f largest and the f smallest (definition 2), K ≥ 2f + 1.
- ``krum``: the report with the smallest sum of squared distances to its K − f − 2 nearest, K ≥ 2f + 3; multi-Krum
  keeps the K − f best of these (Blanchard et al. 2017, arXiv 1703.02757, section 4).
- ``rank``: each device's losses become their ranks, whose mean is taken: a device has one vote on the order of the
  candidates, however large its numbers (Borda's count; in federated learning Mozaffari et al. 2021, arXiv 2110.04350),
  K ≥ 2f + 1.

All devices count alike, where the plain mean weighs by rows: how many rows a device has is its own word.
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
    """The fewest reports by which ``byzantine`` liars are outvoted."""
    if robust == "none":
        return 1
    return 2 * byzantine + (3 if robust == "krum" else 1)


def centre(rows: Floats, weights: Floats, robust: Robust, byzantine: int) -> Floats:
    """One vector [n] for the ``rows`` [K, n] of K devices; ``weights`` [K] sum to 1 and serve the plain mean alone.

    Raises `InputError` for fewer rows than `reports_needed`.
    """
    n_rows = len(rows)
    if n_rows < reports_needed(robust, byzantine):
        raise InputError(f"{robust} against {byzantine} devices that lie needs more than {n_rows} reports")
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
    """Indices of ``rows`` [K, n] by Krum's score, the best first; ties go to the first row."""
    n_rows = len(rows)
    squares = np.array([((rows - row) ** 2).sum(axis=1) for row in rows])
    near = np.sort(squares, axis=1)[:, 1 : n_rows - byzantine - 1]  # 0 is the row itself
    return np.argsort(near.sum(axis=1), kind="stable")


def ranks(rows: Floats) -> Floats:
    """Ranks 0… of each row's entries, equal entries sharing the mean of theirs; the shape of ``rows`` [K, n]."""
    below = (rows[:, None, :] < rows[:, :, None]).sum(axis=2)
    ties = (rows[:, None, :] == rows[:, :, None]).sum(axis=2)
    return np.asarray(below + (ties - 1) / 2)


def _mean(rows: Floats) -> Floats:
    return weighted_sum(np.full(len(rows), 1 / len(rows)), rows)
