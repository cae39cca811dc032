"""A device's search on its own rows: CMA-ES from a state that the server sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedbpt.messages import Array, LocalResult, LocalWork, RoundPlan
from fedbpt.population import transform
from fedbpt.search import CmaSearch, Covariance, rank_bytes
from fedbpt.seeding import derive_seed

Losses: TypeAlias = Callable[[NDArray[np.float64], int], NDArray[np.float64]]


class LocalSearch(NamedTuple):
    """``mean`` [d]; ``sigma_squares``: Σ_i σ_i² over the iterations, each σ as its candidates were drawn; ``ranks``
    [iterations, popsize]: of the candidates, a byte each, from which the rest follows; empty where a byte is too small.
    """

    mean: NDArray[np.float64]
    sigma_squares: float
    ranks: bytes

    def with_fitness(self, fitness: float) -> LocalResult:
        """What a device answers."""
        return LocalResult(
            mean=Array.of(self.mean), fitness=fitness, sigma_squares=self.sigma_squares, ranks=self.ranks
        )


def local_seed(plan: RoundPlan) -> int:
    """Of the candidates that the device searches by in this round: each device has its own."""
    return derive_seed(plan.seed, "local", plan.device, plan.round)


def local_search(work: LocalWork, seed: int, losses: Losses) -> LocalSearch:
    """FedBPT's work on a device (arXiv 2310.01467, algorithm 1): CMA-ES from the server's (m, σ, C).

    Standard CMA-ES runs on y with z = m + L·y, L·Lᵀ = C: the algorithm is invariant under affine maps (Hansen,
    arXiv 1604.00772, section B), so this equals starting it at (m, σ, C), with new evolution paths.
    Step size by path length, as published: a few generations are too short for two-point adaptation.

    Args:
        work: the state and how long to search from it.
        seed: of this device's candidates in this round.
        losses: latents [popsize, d] and the iteration → losses [popsize].
    """
    start = work.state.mean.numpy()
    kind: Covariance = "diagonal" if work.state.covariance is None else "full"
    search = CmaSearch(len(start), work.state.sigma, work.popsize, seed, kind, "path")
    sigma_squares, ranks = 0.0, b""
    for iteration in range(work.iterations):
        sigma_squares += search.sigma**2
        found = losses(start + transform(work.state, search.ask()), iteration)
        search.tell(found)
        ranks += rank_bytes(found)
    return LocalSearch(start + transform(work.state, search.mean[None])[0], sigma_squares, ranks)
