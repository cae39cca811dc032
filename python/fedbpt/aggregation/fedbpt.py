"""FedBPT as published (Sun et al. 2023, arXiv 2310.01467, algorithm 1), for comparison with the pooled default.

A round: the server sends (m, σ, C); device k runs I iterations of CMA-ES with population λ on its own rows and
uploads its mean m_k, the fitness f_k = F(m_k) and Σ_i σ²_{k,i}. The server then sets

    σ_g = √( Σ_k Σ_i σ²_{k,i} / (K·μ_eff) ),        K reports, μ_eff of the devices' λ

makes one CMA-ES update with population K and μ = K on ({m_k}, {f_k}), and scales the next local σ by
σ_after/σ_before. The m_k were not drawn from the server's distribution, so the ``cma`` package treats them as injected:
longer than √d + 2d/(d+2) in Mahalanobis distance, they are shortened to that (Hansen 2011, arXiv 1110.4181).

On skewed data this can collapse: a device with almost only one class has the best fitness, whatever its mean does to
the others.

With a robust rule, multi-Krum keeps the means that lie near each other, and the median of their Σ_i σ²_{k,i} replaces
the mean.

The reference implementation (NVFlare ``research/fed-bpt``) differs. We follow it only with ``compat="nvflare"``:

- It divides by the configured number of clients, not by the number of reports; the same number is the population.
- It divides by the devices' μ (the number of parents, λ // 2), not by μ_eff.
- Its floor of 0.5 for σ and its cap at the value without a floor cancel each other. We have no floor either.
- The package's default below 6 clients is mirrored sampling, which changes the damping of σ though no server sample
  is ever used.
- It gives every client the same seed, so that all draw the same normals each round. Ours are seeded by device and
  round, with compat too: that concerns the server only.
- It selects the prompt to save by test accuracy. We return the mean.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedbpt.aggregation.base import accepted, latents_of
from fedbpt.aggregation.methods import Method, register
from fedbpt.aggregation.robust import Robust, krum, reports_needed
from fedbpt.errors import InputError
from fedbpt.protocol.rounds import LocalResult, LocalWork, RoundReport
from fedbpt.search.cma_es import CmaUpdate, Covariance, farthest, step_within


class FedBPT:
    """The paper's server.

    Args:
        d: dimension of the latent.
        sigma0: initial step size, local and global.
        popsize: λ of the devices' searches.
        iterations: I, generations a device searches per round.
        covariance: ``full`` as published, or ``diagonal`` to send d numbers instead of d².
        n_devices: configured number of devices; ``compat`` needs it.
        compat: ``nvflare`` reproduces the reference implementation's server, see above; as there, all of
            ``n_devices`` must then report in every round.
        robust: ``none``, or ``krum``, see `fedbpt.aggregation.robust`.
        byzantine: number of Byzantine devices tolerated; unused without a robust rule.
    """

    def __init__(
        self,
        d: int,
        sigma0: float = 1.0,
        popsize: int = 5,
        iterations: int = 8,
        covariance: Covariance = "full",
        n_devices: int | None = None,
        compat: Literal["nvflare"] | None = None,
        robust: Robust = "none",
        byzantine: int = 1,
    ) -> None:
        if compat not in (None, "nvflare"):
            raise InputError(f"compat must be None or 'nvflare', got {compat!r}", field="compat")
        if compat and (n_devices is None or n_devices < 2):
            raise InputError("compat='nvflare' needs n_devices of at least 2", field="n_devices", limit=2)
        if iterations < 1:
            raise InputError(f"iterations must be at least 1, got {iterations}", field="iterations", limit=1)
        self._n_devices = n_devices if compat else None
        METHOD.check_robust(robust)
        self._n_byzantine = 0 if robust == "none" else byzantine
        self.min_reports = self._n_devices or max(2, reports_needed(robust, byzantine))
        self._popsize = popsize
        self._iterations = iterations
        # The package's default, which the reference uses: mirrored below a population of 6.
        mirrors = 1 if self._n_devices and self._n_devices < 6 else 0
        self._make = partial(
            CmaUpdate, d, sigma0, self.min_reports, covariance, step_size="path", all_parents=True, mirrors=mirrors
        )
        self._server = self._make()
        self._d = d
        self._sigma0 = float(sigma0)
        self._local_sigma = self._sigma0
        self._parents = popsize // 2 if compat else CmaUpdate(1, 1.0, popsize).mueff
        self._evaluations = 0

    @property
    def mean(self) -> NDArray[np.float64]:
        return self._server.mean

    @property
    def local_sigma(self) -> float:
        """Step size with which devices start the next round."""
        return self._local_sigma

    @property
    def evaluations(self) -> int:
        return self._evaluations

    def work(self, round: int) -> LocalWork:  # noqa: ARG002 - the state decides
        """(m, σ, C) of the server, with the local step size."""
        server = self._server.state()
        state = type(server)(
            mean=server.mean,
            sigma=float(np.float32(self._local_sigma)),
            scales=server.scales,
            covariance=server.covariance,
        )
        return LocalWork(state=state, iterations=self._iterations, popsize=self._popsize)

    def history(self) -> None:
        """None: devices cannot replay a state that is made of all devices' means."""

    def update(self, reports: Sequence[RoundReport]) -> None:
        pairs = accepted(reports, LocalResult, self.min_reports)
        if self._n_devices is not None and len(pairs) != self._n_devices:
            raise InputError(
                f"compat='nvflare' needs all {self._n_devices} devices to report, got {len(pairs)}",
                limit=self._n_devices,
            )
        means = latents_of(pairs, [result.mean.numpy() for _, result in pairs], self._d, "mean")
        fitness = np.array([result.fitness for _, result in pairs])
        if not np.isfinite(fitness).all():
            raise InputError("a report's fitness must be finite", field="fitness")
        squares = np.array([result.sigma_squares for _, result in pairs])
        if self._n_byzantine:
            kept = np.sort(krum(means, self._n_byzantine)[: len(means) - self._n_byzantine])
            means = means[kept]
            fitness = fitness[kept]
            squares = np.full(len(kept), np.median(squares[kept]))
        before = math.sqrt(math.fsum(squares) / (len(squares) * self._parents))
        server = self._server
        server.resize(len(means))
        server.sigma = before
        server.update(means, fitness, foreign=True)
        self._local_sigma = step_within(self._local_sigma * server.sigma / before, farthest(self._sigma0, self._d))
        self._evaluations += max(report.evaluations for report, _ in pairs)

    def restart(self, mean: NDArray[np.float64]) -> None:
        self._server = self._make(start=mean)
        self._local_sigma = self._sigma0

    def digest(self) -> str:
        own = f"{self._popsize}|{self._iterations}|{self._n_devices}|{self._local_sigma.hex()}|{self._evaluations}"
        return hashlib.sha256(f"fedbpt|{own}|{self._server.digest()}".encode()).hexdigest()

    def __repr__(self) -> str:
        return f"FedBPT(d={self._d}, round={self._server.generation}, local σ={self._local_sigma:.3g})"


# Krum only: the server ranks means by their fitness, so it needs means as sent, not combinations of coordinates.
METHOD = register(
    Method(
        name="fedbpt",
        make=lambda s: FedBPT(s.d, s.sigma0, s.popsize, s.iterations, robust=s.robust, byzantine=s.byzantine),
        robust=("none", "krum"),
        local=True,
        private=False,
    )
)
