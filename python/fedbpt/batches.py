"""Which rows a device uses in a generation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def batch_indices(
    n_rows: int, batch_size: int, rng: np.random.Generator, targets: NDArray[np.intp] | None = None
) -> NDArray[np.intp]:
    """A mini-batch without replacement, in ascending order; all rows where ``batch_size`` is 0 or too large.

    With ``targets``, labels are in it in proportion, which takes noise out of its mean: systematic sampling
    (Madow 1949) of the rows in order of label, at random within one. Each row has the same chance as without.
    """
    if batch_size == 0 or batch_size >= n_rows:
        return np.arange(n_rows)
    if targets is None:
        return np.sort(rng.choice(n_rows, batch_size, replace=False))
    order = rng.permutation(n_rows)
    order = order[np.argsort(targets[order], kind="stable")]
    places = np.floor((rng.random() + np.arange(batch_size)) * (n_rows / batch_size)).astype(np.intp)
    return np.sort(order[np.minimum(places, n_rows - 1)])
