"""The exchanges of a layer readout's fit: `SumsWork` and `SumsResult`, `CrossWork` and `CrossResult`."""

from __future__ import annotations

import math
from typing import Final

import msgspec
import numpy as np

from fedbpt.aggregation.layer_fit import sums_of, sums_shapes
from fedbpt.coordinator.reports.report_bounds import MAX_LOSS, ROUNDING
from fedbpt.coordinator.work_kinds.base import check_losses, check_shape
from fedbpt.coordinator.work_kinds.reads_layers import ReadsLayers, check_purpose, check_range, largest_state
from fedbpt.engine.discriminant import LARGEST_SKETCH
from fedbpt.errors import WireError
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import (
    CrossResult,
    CrossWork,
    RoundPlan,
    RoundReport,
    SketchResult,
    SketchWork,
    SumsResult,
    SumsWork,
)
from fedbpt.protocol.specs import Array

MOST_ROUNDED: Final = 1.2
"""Factor by which the squares of all rows may differ from those of states; rounding to 4 bits changes them by 0.4 %."""


class LayerSums(ReadsLayers):
    work = SumsWork
    result = SumsResult

    def check_result(
        self,
        report: RoundReport,
        result: SumsResult,
        plan: RoundPlan,
        work: SumsWork,
        n_rows: int | None,  # noqa: ARG002
    ) -> None:
        check_purpose(result.purpose, work.purpose)
        n_embd = math.prod(result.centres.shape[1:])
        if not n_embd or work.reading.n_embd not in (0, n_embd):
            raise WireError(f"centres has shape {list(result.centres.shape)}, expected a state's size", field="centres")
        for field, got, expected in sums_shapes(result, work.reading, len(plan.labels), (n_embd,)):
            if got != expected:
                raise WireError(f"{field} has shape {list(got)}, expected {list(expected)}", field=field)
        if sum(map(sum, result.counts)) != report.n_texts:
            raise WireError(
                f"counts are of {sum(map(sum, result.counts))} rows, expected the report's {report.n_texts}",
                field="counts",
            )
        _check_ranks(result, work, n_embd)
        largest = largest_state(n_embd)
        for field, array, low, high in (
            ("centres", result.centres, -largest, largest),
            ("means", result.means.scales, 0.0, largest),
            ("factors", result.factors.scales, 0.0, largest * math.sqrt(report.n_texts)),
            ("rests", result.rests, 0.0, largest**2 * report.n_texts),
            ("word_means", result.word_means, -MAX_LOSS, ROUNDING),
        ):
            check_range(array, low, high, field)
        _check_squares(result, n_embd)
        check_losses(np.array([result.loss]), self.loss_range(plan, work), "loss")

    def mean_loss(self, result: SumsResult, n_texts: int) -> float:  # noqa: ARG002
        return result.loss


class LayerCross(ReadsLayers):
    work = CrossWork
    result = CrossResult

    def check_result(
        self,
        report: RoundReport,
        result: CrossResult,
        plan: RoundPlan,
        work: CrossWork,
        n_rows: int | None,  # noqa: ARG002
    ) -> None:
        check_purpose(result.purpose, work.purpose)
        check_shape(result.loss_sums, (work.coefficients.shape[0], work.reading.n_folds), "loss_sums")
        most = _most_loss(plan, work) * (1 + ROUNDING)
        check_losses(result.loss_sums.numpy() / report.n_texts, (-ROUNDING, most), "loss_sums")

    def mean_loss(self, result: CrossResult, n_texts: int) -> float:
        """Of the best mixture."""
        return float(result.loss_sums.numpy().sum(axis=1).min()) / n_texts

    def scaled(self, result: CrossResult, share: float) -> CrossResult:
        return msgspec.structs.replace(result, loss_sums=Array.of(result.loss_sums.numpy() * share, "<f4"))

    def digest(self, work: CrossWork) -> str:
        """Without the classifiers: another BLAS may compute them with other last bits."""
        none = Array.of(np.zeros(0))
        return codec.digest(msgspec.structs.replace(work, weights=none, biases=none))


class LayerSketches(ReadsLayers):
    work = SketchWork
    result = SketchResult

    def check_result(
        self,
        report: RoundReport,
        result: SketchResult,
        plan: RoundPlan,
        work: SketchWork,
        n_rows: int | None,  # noqa: ARG002
    ) -> None:
        check_purpose(result.purpose, work.purpose)
        reading, n_labels = work.reading, len(plan.labels)
        size = math.prod(result.squares.shape[2:])
        if not size or reading.n_embd not in (0, size):
            raise WireError(f"squares has shape {list(result.squares.shape)}, expected a state's size", field="squares")
        folds = reading.n_readers, reading.n_folds
        check_shape(result.counts, (reading.n_folds, n_labels), "counts")
        check_shape(result.sums, (*folds, n_labels, size), "sums")
        check_shape(result.squares, (*folds, size), "squares")
        check_shape(result.sketches, (*folds, size, work.rank), "sketches")
        check_shape(result.word_means, (reading.n_word_views, n_labels if reading.n_word_views else 0), "word_means")
        most = report.n_texts * (1 + ROUNDING) + ROUNDING
        if not math.isclose(result.counts.numpy().sum(), report.n_texts, rel_tol=ROUNDING):
            raise WireError(
                f"counts are of {result.counts.numpy().sum():g} rows, expected {report.n_texts}", field="counts"
            )
        largest = largest_state(size)
        for field, array, low, high in (
            ("counts", result.counts, -ROUNDING, most),
            ("sums", result.sums, -most * largest, most * largest),
            ("squares", result.squares, -ROUNDING, most * largest**2),
            ("sketches", result.sketches, -most * LARGEST_SKETCH * largest**2, most * LARGEST_SKETCH * largest**2),
            ("word_means", result.word_means, -MAX_LOSS, ROUNDING),
        ):
            check_range(array, low, high, field)
        check_losses(np.array([result.loss]), self.loss_range(plan, work), "loss")

    def mean_loss(self, result: SketchResult, n_texts: int) -> float:  # noqa: ARG002
        return result.loss


def _check_ranks(result: SumsResult, work: SumsWork, n_embd: int) -> None:
    """A fold's factor has a row for each row of the fold less its labels; at most `SumsWork.max_rank`, or n_embd."""
    free = [sum(fold) - sum(count > 0 for count in fold) for fold in result.counts]
    expected = [min(each, work.max_rank, n_embd) for each in free]
    if list(result.ranks) != expected:
        raise WireError(f"ranks is {list(result.ranks)}, expected {expected}", field="ranks")


def _check_squares(result: SumsResult, n_embd: int) -> None:
    """A state has the norm √n_embd, so the squares of all rows add up to n_embd for each, but for the rounding."""
    n_rows = sum(map(sum, result.counts))
    for place, folds in enumerate(sums_of(result)):
        squares = sum(
            float(sums.counts[sums.counts > 0] @ (sums.means**2).sum(axis=1) + (sums.factor**2).sum() + sums.rest.sum())
            for sums in folds
        )
        share = squares / (n_rows * n_embd)
        if not 1 / MOST_ROUNDED <= share <= MOST_ROUNDED:
            raise WireError(
                f"the squares of reader {place}'s states are {share:.3g} times what states have, expected about 1",
                field="factors",
            )


def _most_loss(plan: RoundPlan, work: CrossWork) -> float:
    """The largest weighted loss of a row: a state has norm √n_embd, a label word's log-probability a bound."""
    weights = work.weights.numpy()
    norms = math.sqrt(weights.shape[2]) * (1 + ROUNDING) * np.sqrt((weights**2).sum(axis=2))
    columns = (norms + np.abs(work.biases.numpy())).max(axis=(0, 2), initial=0.0)
    of_states = (np.abs(work.coefficients.numpy()) @ columns).max(initial=0.0)
    scales = np.abs(work.word_scales.numpy()).sum(axis=1).max(initial=0.0)
    logit = of_states + scales * (MAX_LOSS + np.abs(work.centres.numpy()).max(initial=0.0))
    return float(max(plan.label_weights, default=1.0) * (2 * logit + math.log(max(len(plan.labels), 2)) + ROUNDING))
