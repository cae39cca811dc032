"""A custom aggregation: the average of the better half of the devices' means.

As in ``fedavg``, each device searches from the shared mean. An aggregator turns their reports into the next round's
work; `register` makes it available as a ``method``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

import fedbpt
from fedbpt.aggregation import Method, SearchSettings, register
from fedbpt.aggregation.base import accepted, latents_of, weighted_sum, weights_of
from fedbpt.protocol.rounds import LocalResult, LocalWork, RoundReport, SearchState
from fedbpt.protocol.specs import Array


class BetterHalf:
    """Implements the protocol `fedbpt.aggregation.base.Aggregator`."""

    min_reports = 1

    def __init__(self, settings: SearchSettings) -> None:
        self.mean = np.zeros(settings.d)
        self.evaluations = 0
        self._sigma = settings.sigma0
        self._settings = settings

    def work(self, round: int) -> LocalWork:  # noqa: ARG002 - the work depends only on the state
        state = SearchState(mean=Array.of(self.mean, "<f4"), sigma=float(np.float32(self._sigma)))
        return LocalWork(state=state, iterations=self._settings.iterations, popsize=self._settings.popsize)

    def history(self) -> None:
        """None: devices cannot recompute the mean from their own history, so each plan contains it."""

    def update(self, reports: Sequence[RoundReport]) -> None:
        by_fitness = sorted(accepted(reports, LocalResult, self.min_reports), key=lambda pair: pair[1].fitness)
        better = by_fitness[: (len(by_fitness) + 1) // 2]
        means = latents_of(better, [result.mean.numpy() for _, result in better], len(self.mean), "mean")
        self.mean = weighted_sum(weights_of(better), means)
        squares = [result.sigma_squares / self._settings.iterations for _, result in better]
        self._sigma = float(np.sqrt(np.mean(squares)))
        self.evaluations += max(report.evaluations for report, _ in by_fitness)

    def restart(self, mean: np.ndarray) -> None:
        self.mean = np.array(mean)
        self._sigma = self._settings.sigma0

    def digest(self) -> str:
        return hashlib.sha256(self.mean.tobytes() + f"{self._sigma.hex()}|{self.evaluations}".encode()).hexdigest()


register(Method(name="better-half", make=BetterHalf, local=True))

if __name__ == "__main__":
    fedbpt.models.pull("smollm2-135m")
    scorer = fedbpt.load_model("smollm2-135m")
    task = fedbpt.tasks.load("bbc-news")
    parts = fedbpt.tasks.split_rows(fedbpt.tasks.bbc_news(), {"train": 32, "test": 40}, seed=1)
    budget = fedbpt.Budget(evaluations=120)
    result = fedbpt.tune(
        scorer, task, parts["train"], budget=budget, method="better-half", iterations=4, popsize=10, seed=7
    )
    tuned = fedbpt.evaluate(scorer, task, parts["test"], prompt=result.prompt)
    print(f"{result.run.settings.method}: {result.run.evaluations} evaluations, accuracy {tuned.accuracy:.3f}")
