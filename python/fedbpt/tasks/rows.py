"""A device's rows: their targets, and which of them it uses in a generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedbpt.errors import DataError

Row: TypeAlias = tuple[str, int | str]
"""(text, label index), or (text, target text) where a task has no labels."""


class LabelIndex(int):
    """A label's index that knows the label's name, by which a row keeps its label where it is read again."""

    name: str

    def __new__(cls, index: int, name: str) -> LabelIndex:
        made = super().__new__(cls, index)
        made.name = name
        return made

    def __getnewargs__(self) -> tuple[int, str]:  # type: ignore[override]
        return int(self), self.name


def batch_indices(
    n_rows: int,
    batch_size: int,
    rng: np.random.Generator,
    targets: NDArray[np.intp] | None = None,
    weights: NDArray[np.float64] | None = None,
) -> NDArray[np.intp]:
    """A mini-batch without replacement, in ascending order; all rows where ``batch_size`` is 0 or too large.

    With ``targets``, labels are in it in proportion, which takes noise out of its mean: systematic sampling
    (Madow 1949) of the rows in order of label, at random within one. Each row has the same chance as without, or with
    ``weights`` [n_rows] one in proportion to its weight; a row of much weight may then come more than once.
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
    """Label indices [n]; zeros for target texts. Raises `DataError` for what is neither in its place."""
    for number, (_, label) in enumerate(rows):
        if not labels and not isinstance(label, str):
            raise DataError(f"row {number} has a label where a target text should be: the task has no labels")
        if labels and not (isinstance(label, int | np.integer) and 0 <= label < len(labels)):
            known = f"but there are {len(labels)} labels: {', '.join(labels)}"
            raise DataError(f"row {number} has label {label!r}, {known}", public=f"row {number} has another, {known}")
        if labels and isinstance(label, LabelIndex) and labels[label] != label.name:
            raise DataError(f"row {number} was read for other labels than the task has: read the rows for this task")
    return np.array([label if labels else 0 for _, label in rows], dtype=np.intp)
