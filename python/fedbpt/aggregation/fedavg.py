"""FedAvg of local search means (McMahan et al. 2017, arXiv 1602.05629, with CMA-ES in place of gradient descent).

Device k searches from the shared mean and step size with C = I; the server averages the means, weighted by texts, and
the mean squares of the step sizes likewise. One exchange serves several generations, for high latency. With a robust
rule, another centre replaces the average of the means, and the median that of the squares.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedbpt.aggregation.base import accepted, latents_of, weighted_sum, weights_of
from fedbpt.aggregation.methods import Method, register
from fedbpt.aggregation.robust import Robust, centre, reports_needed
from fedbpt.errors import InputError
from fedbpt.protocol.rounds import LocalResult, LocalWork, RoundReport, SearchState
from fedbpt.protocol.specs import Array
from fedbpt.search.cma_es import farthest, step_within


class FedAvg:
    """Weighted average of the devices' means.

    Args:
        d: dimension of the latent.
        sigma0: initial step size.
        popsize: λ of the devices' searches.
        iterations: generations a device searches per round.
        robust: rule that replaces the average, see `fedbpt.aggregation.robust`.
        byzantine: number of Byzantine devices tolerated; unused without a robust rule.
    """

    def __init__(
        self,
        d: int,
        sigma0: float = 1.0,
        popsize: int = 16,
        iterations: int = 8,
        robust: Robust = "none",
        byzantine: int = 1,
    ) -> None:
        if d < 1 or iterations < 1:
            field = "d" if d < 1 else "iterations"
            raise InputError(f"d and iterations must be at least 1, got {d} and {iterations}", field=field, limit=1)
        if not (math.isfinite(sigma0) and sigma0 > 0):
            raise InputError(f"sigma0 must be positive and finite, got {sigma0}", field="sigma0")
        METHOD.check_robust(robust)
        self._robust: Robust = robust
        self._byzantine = byzantine
        self.min_reports = reports_needed(robust, byzantine)
        self._mean: NDArray[np.float64] = np.zeros(d)
        self._sigma0 = float(sigma0)
        self._sigma = self._sigma0
        self._popsize = popsize
        self._iterations = iterations
        self._rounds = 0
        self._evaluations = 0

    @property
    def mean(self) -> NDArray[np.float64]:
        return np.array(self._mean)

    @property
    def evaluations(self) -> int:
        return self._evaluations

    def work(self, round: int) -> LocalWork:  # noqa: ARG002 - the state decides
        """A search from the shared mean."""
        state = SearchState(mean=Array.of(self._mean, "<f4"), sigma=float(np.float32(self._sigma)))
        return LocalWork(state=state, iterations=self._iterations, popsize=self._popsize)

    def history(self) -> None:
        """None: devices cannot replay a state that is made of all devices' means."""

    def update(self, reports: Sequence[RoundReport]) -> None:
        pairs = accepted(reports, LocalResult, self.min_reports)
        means = latents_of(pairs, [result.mean.numpy() for _, result in pairs], len(self._mean), "mean")
        weights = weights_of(pairs)
        squares = np.array([[result.sigma_squares] for _, result in pairs])
        limit = farthest(self._sigma0, len(self._mean))
        self._mean = np.clip(centre(means, weights, self._robust, self._byzantine), -limit, limit)
        square = weighted_sum(weights, squares)[0] if self._robust == "none" else np.median(squares)
        self._sigma = step_within(math.sqrt(square / self._iterations), limit)
        self._rounds += 1
        self._evaluations += max(report.evaluations for report, _ in pairs)

    def restart(self, mean: NDArray[np.float64]) -> None:
        self._mean = np.array(mean)
        self._sigma = self._sigma0

    def digest(self) -> str:
        own = f"{self._popsize}|{self._iterations}|{self._rounds}|{self._sigma.hex()}|{self._evaluations}|"
        return hashlib.sha256(b"fedavg|" + own.encode() + self._mean.astype("<f8").tobytes()).hexdigest()

    def __repr__(self) -> str:
        return f"FedAvg(d={len(self._mean)}, round={self._rounds}, σ={self._sigma:.3g})"


METHOD = register(
    Method(
        name="fedavg",
        make=lambda s: FedAvg(s.d, s.sigma0, s.popsize, s.iterations, s.robust, s.byzantine),
        robust=("none", "median", "trimmed-mean", "krum"),
        local=True,
    )
)
