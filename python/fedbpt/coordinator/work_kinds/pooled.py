"""A generation that all devices score: `PooledWork` and `PooledResult`."""

from __future__ import annotations

import numpy as np

from fedbpt.coordinator.work_kinds.base import WorkKind, check_losses, check_shape, max_batch
from fedbpt.protocol.rounds import PooledResult, PooledWork, RoundPlan, RoundReport
from fedbpt.search.population import transform


class Pooled(WorkKind[PooledWork, PooledResult]):
    work = PooledWork
    result = PooledResult
    searches = True

    def check_result(
        self,
        report: RoundReport,  # noqa: ARG002
        result: PooledResult,
        plan: RoundPlan,
        work: PooledWork,
        n_rows: int | None,  # noqa: ARG002
    ) -> None:
        check_shape(result.losses, (work.popsize,), "losses")
        check_losses(result.losses.numpy(), self.loss_range(plan, work), "losses")

    def max_evaluations(self, plan: RoundPlan, work: PooledWork) -> int:  # noqa: ARG002
        return work.popsize

    def max_texts(self, plan: RoundPlan, work: PooledWork, n_texts: int) -> int:
        return work.popsize * max_batch(plan, n_texts)

    def mean_loss(self, result: PooledResult, n_texts: int) -> float:  # noqa: ARG002
        return float(result.losses.numpy().mean())

    def check_work(self, plan: RoundPlan, work: PooledWork) -> None:
        transform(work.state, np.zeros((1, plan.prompt.d)))
