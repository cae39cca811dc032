"""A device's local search on its own rows: CMA-ES from a state that the server sent."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedbpt.protocol.rounds import LocalResult, LocalWork, RoundPlan
from fedbpt.protocol.seeding import derive_seed
from fedbpt.protocol.specs import Array
from fedbpt.search.cma_es import CmaSearch, Covariance, rank_bytes
from fedbpt.search.population import transform

Losses: TypeAlias = Callable[[NDArray[np.float64], int], NDArray[np.float64]]


class LocalSearch(NamedTuple):
    """The result of `local_search`.

    ``mean``: [d]. ``sigma_squares``: Σ_i σ_i², with σ_i the step size from which iteration i's candidates were drawn.
    ``ranks``: bytes [iterations, popsize] of the candidates' ranks, which determine the rest; empty if popsize > 256.
    """

    mean: NDArray[np.float64]
    sigma_squares: float
    ranks: bytes

    def with_fitness(self, fitness: float) -> LocalResult:
        """The result as sent to the coordinator."""
        return LocalResult(
            mean=Array.of(self.mean), fitness=fitness, sigma_squares=self.sigma_squares, ranks=self.ranks
        )


def local_seed(plan: RoundPlan) -> int:
    """The seed of a local search's candidates, different for each device and round."""
    return derive_seed(plan.seed, "local", plan.device, plan.round)


def farthest_move(work: LocalWork) -> float:
    """Upper bound of the distance of `local_search`'s mean from the state's mean, for any losses.

    The mean moves less than the distance of its candidates: σ·s·‖n‖, with s the largest standard deviation and n a
    vector of normals, ‖n‖ < √d + 8. σ grows by a factor below e^(2/√d) per iteration; measured with losses that favour
    the longest steps it is half as much.
    """
    state = work.state
    d = len(state.mean.numpy())
    widest = 1.0
    if state.scales is not None:
        widest = float(state.scales.numpy().max())
    elif state.covariance is not None:
        widest = math.sqrt(np.trace(state.covariance.numpy()))
    return state.sigma * widest * (math.sqrt(d) + 8) * _growth(work.iterations, 2 / math.sqrt(d))


def sigma_squares_bounds(work: LocalWork) -> tuple[float, float]:
    """Lower and upper bound of Σ_i σ_i² of `local_search`: the first σ is the state's, growth as in `farthest_move`."""
    d = len(work.state.mean.numpy())
    return work.state.sigma**2, work.state.sigma**2 * _growth(work.iterations, 4 / math.sqrt(d))


def _growth(iterations: int, rate: float) -> float:
    """Σ_i e^(i·rate), with exponents capped at 60."""
    return float(np.exp(np.minimum(rate * np.arange(iterations), 60.0)).sum())


def local_search(work: LocalWork, seed: int, losses: Losses) -> LocalSearch:
    """FedBPT's work on a device (arXiv 2310.01467, algorithm 1): CMA-ES from the server's (m, σ, C).

    Standard CMA-ES runs on y with z = m + L·y, L·Lᵀ = C: the algorithm is invariant under affine maps (Hansen,
    arXiv 1604.00772, section B), so this equals starting it at (m, σ, C) with new evolution paths.
    The step size is adapted by path length, as published: a few generations are too short for two-point adaptation.

    Args:
        work: the state, population size and number of iterations.
        seed: see `local_seed`.
        losses: function of latents [popsize, d] and the iteration that returns losses [popsize].
    """
    start = work.state.mean.numpy()
    kind: Covariance = "diagonal" if work.state.covariance is None else "full"
    search = CmaSearch(len(start), work.state.sigma, work.popsize, seed, kind, "path")
    sigma_squares = 0.0
    ranks = b""
    for iteration in range(work.iterations):
        sigma_squares += search.sigma**2
        found = losses(start + transform(work.state, search.ask()), iteration)
        search.tell(found)
        ranks += rank_bytes(found)
    return LocalSearch(start + transform(work.state, search.mean[None])[0], sigma_squares, ranks)
