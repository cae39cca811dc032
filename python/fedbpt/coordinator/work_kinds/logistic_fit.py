"""The exchanges of a logistic regression on states: `MomentsWork` and its result, `LogisticWork` and its result."""

from __future__ import annotations

import math

import numpy as np

from fedbpt.aggregation.logistic_fit import gradient_shapes, moments_shapes
from fedbpt.coordinator.reports.report_bounds import MAX_LOSS, ROUNDING
from fedbpt.coordinator.work_kinds.base import check_losses, check_shape
from fedbpt.coordinator.work_kinds.reads_layers import ReadsLayers, check_purpose, check_range, largest_state
from fedbpt.errors import WireError
from fedbpt.protocol.rounds import LogisticResult, LogisticWork, MomentsResult, MomentsWork, RoundPlan, RoundReport


class StateMoments(ReadsLayers):
    work = MomentsWork
    result = MomentsResult

    def check_result(
        self,
        report: RoundReport,  # noqa: ARG002
        result: MomentsResult,
        plan: RoundPlan,
        work: MomentsWork,
        n_rows: int | None,  # noqa: ARG002
    ) -> None:
        check_purpose(result.purpose, work.purpose)
        n_embd = max(result.means.shape[-1:], default=0)
        if not n_embd or work.reading.n_embd not in (0, n_embd):
            raise WireError(f"means has shape {list(result.means.shape)}, expected a state's size", field="means")
        for field, shape in moments_shapes(work.reading, len(plan.labels), n_embd).items():
            check_shape(getattr(result, field), shape, field)
        largest = largest_state(n_embd)
        check_range(result.means, -largest, largest, "means")
        check_range(result.squares, 0.0, largest**2, "squares")
        check_range(result.word_means, -MAX_LOSS, ROUNDING, "word_means")
        check_range(result.word_squares, 0.0, MAX_LOSS**2, "word_squares")
        if (result.squares.numpy() * (1 + ROUNDING) + 1e-6 < result.means.numpy() ** 2).any():
            raise WireError("squares: a mean of squares must not be below the square of the mean", field="squares")
        check_losses(np.array([result.loss]), self.loss_range(plan, work), "loss")

    def mean_loss(self, result: MomentsResult, n_texts: int) -> float:  # noqa: ARG002
        return result.loss


class StateLogistic(ReadsLayers):
    work = LogisticWork
    result = LogisticResult

    def check_result(
        self,
        report: RoundReport,  # noqa: ARG002
        result: LogisticResult,
        plan: RoundPlan,
        work: LogisticWork,
        n_rows: int | None,  # noqa: ARG002
    ) -> None:
        """A row's gradient by a logit is a difference of probabilities; by a weight, that times what it weighs."""
        check_purpose(result.purpose, work.purpose)
        for field, shape in gradient_shapes(work).items():
            check_shape(getattr(result, field), shape, field)
        heaviest = max(plan.label_weights, default=1.0) * (1 + ROUNDING)
        n_embd = work.centre.shape[-1]
        of_states = largest_state(n_embd) + float(np.abs(work.centre.numpy()).max(initial=0.0))
        of_words = MAX_LOSS + float(np.abs(work.word_centre.numpy()).max(initial=0.0))
        for field, array, most in (
            ("by_weights", result.by_weights, heaviest * of_states),
            ("by_word_scales", result.by_word_scales, 2 * heaviest * of_words),
            ("by_bias", result.by_bias, heaviest),
        ):
            check_range(array, -most, most, field)
        most_loss = heaviest * (2 * _largest_logit(work, of_words) + math.log(max(len(plan.labels), 2)) + ROUNDING)
        check_losses(result.losses.numpy(), (-ROUNDING, most_loss), "losses")

    def mean_loss(self, result: LogisticResult, n_texts: int) -> float:  # noqa: ARG002
        return float(result.losses.numpy()[0])


def _largest_logit(work: LogisticWork, of_words: float) -> float:
    """At any point of ``work``: a state has norm √n_embd in each view and layer."""
    weights = work.weights.numpy()
    norms = np.sqrt((weights**2).sum(axis=3))  # [n_points, n_views, n_layers, n_labels]
    apart = largest_state(weights.shape[3]) + np.sqrt((work.centre.numpy() ** 2).sum(axis=2))
    of_states = np.einsum("vl,pvlk->pk", apart, norms).max(initial=0.0)
    of_scales = of_words * np.abs(work.word_scales.numpy()).sum(axis=1).max(initial=0.0)
    return float(of_states + of_scales + np.abs(work.bias.numpy()).max(initial=0.0))
