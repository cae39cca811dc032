"""A device's search on its own rows: CMA-ES from a state that the server sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedbpt.messages import LocalWork
from fedbpt.population import transform
from fedbpt.search import CmaSearch, Covariance

Losses: TypeAlias = Callable[[NDArray[np.float64], int], NDArray[np.float64]]


def local_search(work: LocalWork, seed: int, losses: Losses) -> tuple[NDArray[np.float64], float]:
    """FedBPT's work on a device (arXiv 2310.01467, algorithm 1): CMA-ES from the server's (m, σ, C).

    Standard CMA-ES runs on y with z = m + L·y, L·Lᵀ = C: the algorithm is invariant under affine maps (Hansen,
    arXiv 1604.00772, section B), so this equals starting it at (m, σ, C), with new evolution paths.
    Step size by path length, as published: a few generations are too short for two-point adaptation.

    Args:
        work: the state and how long to search from it.
        seed: of this device's candidates in this round.
        losses: latents [popsize, d] and the iteration → losses [popsize].

    Returns:
        The mean [d], and Σ_i σ_i² over the iterations, each σ as its candidates were drawn.
    """
    start = work.state.mean.numpy()
    kind: Covariance = "diagonal" if work.state.covariance is None else "full"
    search = CmaSearch(len(start), work.state.sigma, work.popsize, seed, kind, "path")
    sigma_squares = 0.0
    for iteration in range(work.iterations):
        sigma_squares += search.sigma**2
        search.tell(losses(start + transform(work.state, search.ask()), iteration))
    return start + transform(work.state, search.mean[None])[0], sigma_squares
