"""A search on each device: `LocalWork` and `LocalResult`."""

from __future__ import annotations

import numpy as np

from fedbpt.coordinator.reports.report_bounds import ROUNDING
from fedbpt.coordinator.work_kinds.base import WorkKind, check_losses, check_shape, max_batch
from fedbpt.errors import WireError
from fedbpt.protocol.rounds import LocalResult, LocalWork, RoundPlan, RoundReport
from fedbpt.search.local_search import farthest_move, sigma_squares_bounds
from fedbpt.search.population import transform


class Local(WorkKind[LocalWork, LocalResult]):
    work = LocalWork
    result = LocalResult
    searches = True

    def check_result(
        self,
        report: RoundReport,  # noqa: ARG002
        result: LocalResult,
        plan: RoundPlan,
        work: LocalWork,
        n_rows: int | None,  # noqa: ARG002
    ) -> None:
        check_shape(result.mean, (plan.prompt.d,), "mean")
        n_ranks = work.iterations * work.popsize
        if len(result.ranks) not in (0, n_ranks):
            raise WireError(f"ranks has {len(result.ranks)} entries, expected 0 or {n_ranks}", field="ranks")
        check_losses(np.array([result.fitness]), self.loss_range(plan, work), "fitness")
        moved = float(np.linalg.norm(result.mean.numpy() - work.state.mean.numpy()))
        farthest = farthest_move(work)
        if moved > farthest:
            raise WireError(
                f"mean lies {moved:.3g} from the plan's, expected at most {farthest:.3g}", field="mean", limit=farthest
            )
        low, high = sigma_squares_bounds(work)
        if not low * (1 - ROUNDING) <= result.sigma_squares <= high * (1 + ROUNDING):
            raise WireError(
                f"sigma_squares is {result.sigma_squares:.3g}, expected {low:.3g} to {high:.3g}", field="sigma_squares"
            )

    def max_evaluations(self, plan: RoundPlan, work: LocalWork) -> int:  # noqa: ARG002
        return work.popsize * work.iterations + 1

    def max_texts(self, plan: RoundPlan, work: LocalWork, n_texts: int) -> int:
        return work.popsize * work.iterations * max_batch(plan, n_texts) + n_texts  # the mean is scored on all rows

    def mean_loss(self, result: LocalResult, n_texts: int) -> float:  # noqa: ARG002
        return result.fitness

    def check_work(self, plan: RoundPlan, work: LocalWork) -> None:
        transform(work.state, np.zeros((1, plan.prompt.d)))
