"""`Evaluation`: results of prompts on rows."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray


class Evaluation(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Results of k prompts on n rows. ``predictions`` int [k, n] are label indices; losses are nats (or hinge units).

    ``losses`` [k, n]: of each row, weighted.

    Without labels, ``predictions`` are −1 and ``correct`` 0.
    """

    n: int
    correct: tuple[int, ...]
    loss_sums: tuple[float, ...]
    losses: NDArray[np.float64]
    predictions: NDArray[np.intp]

    @property
    def accuracy(self) -> tuple[float, ...]:
        return tuple(c / self.n for c in self.correct)
