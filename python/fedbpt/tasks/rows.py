"""Rows, their targets, and the mini-batch of a generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedbpt.errors import DataError

Row: TypeAlias = tuple[str, int | str]
"""(text, label index), or (text, target text) for a task without labels."""


class LabelIndex(int):
    """A label's index together with its name, so that reading a row again for another label order keeps its label."""

    name: str

    def __new__(cls, index: int, name: str) -> LabelIndex:
        instance = super().__new__(cls, index)
        instance.name = name
        return instance

    def __getnewargs__(self) -> tuple[int, str]:  # type: ignore[override]
        return int(self), self.name


def spread(n_rows: int, n: int) -> NDArray[np.intp]:
    """``n`` indices of rows at equal distances, ascending; all if there are no more: a file may be sorted."""
    return np.arange(n_rows) if n >= n_rows else np.arange(n) * n_rows // n


def batch_indices(
    n_rows: int,
    batch_size: int,
    rng: np.random.Generator,
    targets: NDArray[np.intp] | None = None,
    weights: NDArray[np.float64] | None = None,
) -> NDArray[np.intp]:
    """Draw a mini-batch of row indices without replacement, ascending; all rows if ``batch_size`` is 0 or too large.

    With ``targets`` [n_rows], it is stratified by label, which reduces the variance of its mean: systematic sampling
    (Madow 1949) of the rows in order of label, shuffled within each label. All rows have equal probability, or with
    ``weights`` [n_rows] one proportional to their weight; a row of large weight may then occur more than once.
    """
    if batch_size == 0 or batch_size >= n_rows:
        return np.arange(n_rows)
    if targets is None:
        return np.sort(rng.choice(n_rows, batch_size, replace=False))
    order = rng.permutation(n_rows)
    order = order[np.argsort(targets[order], kind="stable")]
    ends = np.cumsum(np.ones(n_rows) if weights is None else weights[order])
    places = np.searchsorted(ends, (rng.random() + np.arange(batch_size)) * (ends[-1] / batch_size), side="right")
    return np.sort(order[np.minimum(places, n_rows - 1)])


def targets_of(rows: Sequence[Row], labels: tuple[str, ...]) -> NDArray[np.intp]:
    """Label indices [n]; zeros for target texts. Raises `DataError` for a label that does not fit the task."""
    for number, (_, label) in enumerate(rows):
        if not labels and not isinstance(label, str):
            raise DataError(
                f"row {number} has a label index, this task without labels needs target texts", field="label"
            )
        if labels and not (isinstance(label, int | np.integer) and 0 <= label < len(labels)):
            expected = f"expected the index of one of {len(labels)} labels: {', '.join(labels)}"
            raise DataError(
                f"row {number} has label {label!r}, {expected}",
                public=f"row {number} has an unknown label, {expected}",
                field="label",
            )
        if labels and isinstance(label, LabelIndex) and labels[label] != label.name:
            raise DataError(
                f"row {number} was read for other labels than this task's: read the rows for this task", field="label"
            )
    return np.array([label if labels else 0 for _, label in rows], dtype=np.intp)
