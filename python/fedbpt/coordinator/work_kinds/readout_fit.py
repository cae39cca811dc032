"""An exchange of a readout's fit: `FitWork` and `FitResult`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedbpt.coordinator.reports.report_bounds import MAX_LOGIT, ROUNDING
from fedbpt.coordinator.work_kinds.base import WorkKind, check_losses, check_shape
from fedbpt.errors import WireError
from fedbpt.protocol.rounds import FitResult, FitWork, RoundPlan, RoundReport
from fedbpt.protocol.specs import Readout, Template
from fedbpt.runs.events import RoundPurpose


class ReadoutFit(WorkKind[FitWork, FitResult]):
    work = FitWork
    result = FitResult

    def check_result(
        self,
        report: RoundReport,  # noqa: ARG002
        result: FitResult,
        plan: RoundPlan,
        work: FitWork,
        n_rows: int | None,  # noqa: ARG002
    ) -> None:
        if result.purpose != work.purpose:
            raise WireError(f"purpose is {result.purpose!r}, expected {work.purpose!r}", field="purpose")
        moments = (1 + len(work.others), 1 + work.n_words)
        check_shape(result.means, moments if work.readout is None else (*moments, len(plan.labels)), "means")
        check_losses(np.array([result.loss]), self.loss_range(plan, work), "loss")
        means = result.means.numpy()
        excess = float((np.abs(means) / means_bound(plan, work)).max())
        if excess > 1:
            raise WireError(f"means are {excess:.3g} times the maximum", field="means")
        if work.readout is None:
            squares = means[:, -1]
            if (squares * (1 + ROUNDING) + 1e-9 < (means[:, :-1] ** 2).sum(axis=1)).any():
                raise WireError("means: a mean of squares must not be below the square of the mean", field="means")

    def max_evaluations(self, plan: RoundPlan, work: FitWork) -> int:  # noqa: ARG002
        return 1 + len(work.others)

    def max_texts(self, plan: RoundPlan, work: FitWork, n_texts: int) -> int:  # noqa: ARG002
        return (1 + len(work.others)) * n_texts

    def max_rows(self, work: FitWork) -> int:
        return work.max_rows

    def templates(self, plan: RoundPlan, work: FitWork) -> tuple[Template, ...]:
        return (plan.template, *work.others)

    def readout(self, work: FitWork) -> Readout | None:
        return work.readout

    def mean_loss(self, result: FitResult, n_texts: int) -> float:  # noqa: ARG002
        return result.loss

    def purpose(self, result: FitResult) -> RoundPurpose:
        return result.purpose


def means_bound(plan: RoundPlan, work: FitWork) -> NDArray[np.float64]:
    """Largest absolute values of `FitResult.means`, in a shape that broadcasts to theirs.

    A row's gradient by a label's logit is a difference of probabilities; by V it is that times (1, x − centre).
    """
    if work.readout is None:
        logits = np.full(1 + work.n_words, MAX_LOGIT)
        logits[-1] = work.n_words * MAX_LOGIT**2
        return logits
    centre = 0.0 if work.centre is None else float(np.abs(work.centre.numpy()).max(initial=0.0))
    bound = np.full((1 + work.n_words, 1), MAX_LOGIT + centre)
    bound[0] = 1.0
    return bound * max(plan.label_weights, default=1.0) * (1 + ROUNDING)
