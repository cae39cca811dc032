"""Pooled search: one exact global CMA-ES, whose population every device draws from a shared seed.

Each device scores all candidates on its own mini-batch and sends λ losses; their mean, weighted by texts, is an
unbiased estimate of the global loss. So this is centralised CMA-ES on the pooled data, however skewed the devices are,
for one exchange per generation. Ours; no paper.

With tiny mini-batches the search's mean wanders around the optimum, so the result is an average of the means in which
late ones count more: polynomial-decay averaging (Shamir & Zhang 2013, arXiv 1212.1824, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbpt.aggregation.base import accepted, latents_of, weights_of
from fedbpt.aggregation.methods import Method, register
from fedbpt.aggregation.robust import Robust, centre, reports_needed
from fedbpt.protocol.rounds import PooledResult, PooledWork, RoundReport, SearchHistory
from fedbpt.protocol.specs import Array
from fedbpt.search.cma_es import MOST_RANKED, CmaSearch, Covariance, StepSize, rank_bytes

DECAY = 3
"""η of the averaging: mean t has a weight of about t^η."""


class Pooled:
    """The default of a federation.

    Args:
        d: dimension of the latent.
        sigma0: initial step size.
        popsize: candidates per generation, λ.
        seed: of the run; devices draw the population from it.
        covariance: ``diagonal`` or ``full``.
        step_size: ``auto`` (by the dimension), ``path`` or ``two_point``, see `fedbpt.search.cma_es.CmaUpdate`.
        robust: rule that replaces the weighted mean of losses, see `fedbpt.aggregation.robust`.
        byzantine: number of Byzantine devices tolerated; unused without a robust rule.
    """

    def __init__(
        self,
        d: int,
        sigma0: float = 1.0,
        popsize: int = 16,
        seed: int = 0,
        covariance: Covariance = "diagonal",
        step_size: StepSize = "auto",
        robust: Robust = "none",
        byzantine: int = 1,
    ) -> None:
        METHOD.check_robust(robust)
        self._robust: Robust = robust
        self._byzantine = byzantine
        self.min_reports = reports_needed(robust, byzantine)
        self._make = partial(CmaSearch, d, sigma0, popsize, seed, covariance, step_size)
        self._search = self._make()
        self._began = SearchHistory(sigma0=sigma0, popsize=popsize, covariance=covariance, step_size=step_size)
        self._told = bytearray()
        self._average = self._search.mean
        self._before = 0  # evaluations before the last restart

    @property
    def mean(self) -> NDArray[np.float64]:
        """The average of the search's means [d]."""
        return np.array(self._average)

    @property
    def evaluations(self) -> int:
        return self._before + self._search.evaluations

    def work(self, round: int) -> PooledWork:  # noqa: ARG002 - the generation follows from the updates
        """The next generation; the same one again if a round closed without an update."""
        search = self._search
        return PooledWork(state=search.state(), generation=search.generation, popsize=search.popsize)

    def history(self) -> SearchHistory | None:
        """The ranks of all updates; None if a rank does not fit into a byte."""
        if self._search.popsize > MOST_RANKED:
            return None
        return msgspec.structs.replace(self._began, ranks=bytes(self._told))

    def update(self, reports: Sequence[RoundReport]) -> None:
        pairs = accepted(reports, PooledResult, self.min_reports)
        losses = latents_of(pairs, [result.losses.numpy() for _, result in pairs], self._search.popsize, "losses")
        if self._robust != "none":
            # Some devices have harder texts: compare the candidates within each device.
            losses = losses - losses.mean(axis=1, keepdims=True)
        combined = centre(losses, weights_of(pairs), self._robust, self._byzantine)
        self._search.tell(combined)
        self._told += rank_bytes(combined)
        share = (DECAY + 1) / (self._search.told + DECAY)
        self._average = self._average + share * (self._search.mean - self._average)

    def restart(self, mean: NDArray[np.float64]) -> None:
        self._before = self.evaluations
        first = self._search.generation
        self._search = self._make(start=mean, first=first)
        self._began = msgspec.structs.replace(self._began, first=first, start=Array.of(mean, "<f4"))
        self._told.clear()
        self._average = self._search.mean

    def digest(self) -> str:
        return self._search.digest()

    def __repr__(self) -> str:
        return f"Pooled({self._search!r})"


# No Krum: it would keep the losses of one device's mini-batch.
METHOD = register(
    Method(
        name="pooled",
        make=lambda s: Pooled(s.d, s.sigma0, s.popsize, s.seed, robust=s.robust, byzantine=s.byzantine),
        robust=("none", "median", "trimmed-mean", "rank"),
    )
)
