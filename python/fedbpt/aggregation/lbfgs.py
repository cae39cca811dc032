"""`Lbfgs`: minimises a function whose value and gradient come from devices, one exchange an evaluation.

L-BFGS (Nocedal & Wright 2006, alg. 7.4) with Armijo's rule: a step that gains too little is shortened, and costs an
exchange too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_MEMORY = 10  # pairs kept
_ARMIJO = 1e-4  # least decrease, as a share of the linear prediction
_SHORTEN = 0.3  # factor of a step that decreases less
_MIN_GAIN = 3e-4  # the search ends with an evaluation that gains less
_MAX_STEP = 1e4  # norm of a step: devices can still compute with the result


class Lbfgs:
    """A minimum is sought from 0.

    Args:
        shape: of a point.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.best: Floats = np.zeros(shape)
        """The point of the lowest value so far."""
        self.value = math.inf
        """Its value."""
        self.done = False
        """Whether the last evaluation gained next to nothing."""
        self._gradient: Floats = np.zeros(shape)
        self._move: Floats = np.zeros(shape)
        self.length = 0.0
        """Of the step that is tried, as a share of the whole one; 0: the first point."""
        self._pairs: list[tuple[Floats, Floats]] = []

    @property
    def point(self) -> Floats:
        """Where to evaluate next."""
        return self.best + self.length * self._move

    def forget(self) -> None:
        """The function has changed: earlier values cannot be compared with the next one."""
        self._pairs = []
        self.value = math.inf

    def end(self) -> None:
        """Keep `best` and `value` alone: nothing more is learnt."""
        self._pairs = []
        self._gradient = self._move = np.zeros(1)
        self.length = 0.0
        self.done = True

    def __deepcopy__(self, memo: dict[int, object]) -> Lbfgs:
        return copy.copy(self)  # arrays and lists are replaced, never changed

    def learn(self, value: float, gradient: Floats) -> None:
        """Take the value and the gradient at `point`."""
        slope = float((self._gradient * self._move).sum())
        if math.isfinite(self.value) and value > self.value + _ARMIJO * self.length * slope:
            self.length *= _SHORTEN
            return
        step = self.length * self._move
        difference = gradient - self._gradient
        if math.isfinite(self.value) and float((step * difference).sum()) > 0:
            self._pairs = [*self._pairs, (step, difference)][-_MEMORY:]
        self.done = self.value - value < _MIN_GAIN
        self.best = self.best + step
        self.value = value
        self._gradient = gradient
        self._move = self._direction()
        self.length = min(1.0, _MAX_STEP / max(float(np.sqrt((self._move**2).sum())), 1.0))

    def state(self) -> Iterator[Floats]:
        """With `length` and `value` all that decides what comes next."""
        yield from (self.best, self._gradient, self._move)
        yield from (array for pair in self._pairs for array in pair)

    def _direction(self) -> Floats:
        """−H·gradient by the two loops of L-BFGS."""
        move: Floats = self._gradient.copy()
        taken = []
        for step, difference in reversed(self._pairs):
            share = float((step * move).sum() / (step * difference).sum())
            move -= share * difference
            taken.append(share)
        if self._pairs:
            step, difference = self._pairs[-1]
            move *= float((step * difference).sum() / (difference**2).sum())
        else:
            move /= max(1.0, float(np.sqrt((move**2).sum())))
        for (step, difference), share in zip(self._pairs, reversed(taken), strict=True):
            move += step * (share - float((difference * move).sum() / (step * difference).sum()))
        return np.negative(move)
