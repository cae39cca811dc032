"""The exchanges of a layer readout's fit: `SumsWork` and `SumsResult`, `CrossWork` and `CrossResult`."""

from __future__ import annotations

import math

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbpt.coordinator.report_bounds import MAX_LOSS, ROUNDING
from fedbpt.coordinator.work_kinds.base import WorkKind, check_losses, check_shape
from fedbpt.errors import WireError
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import (
    CrossResult,
    CrossWork,
    FitPurpose,
    RoundPlan,
    RoundReport,
    SumsResult,
    SumsWork,
)
from fedbpt.protocol.specs import Array, Template
from fedbpt.runs.events import RoundPurpose


class _Reads(WorkKind):  # type: ignore[type-arg]  # of one of the two works
    """What both works have in common: they read rows, or have them already."""

    def max_evaluations(self, plan: RoundPlan, work: SumsWork | CrossWork) -> int:  # noqa: ARG002
        return work.reading.n_views

    def max_texts(self, plan: RoundPlan, work: SumsWork | CrossWork, n_texts: int) -> int:  # noqa: ARG002
        return work.reading.n_views * n_texts

    def max_rows(self, work: SumsWork | CrossWork) -> int:
        return work.reading.max_rows

    def templates(self, plan: RoundPlan, work: SumsWork | CrossWork) -> tuple[Template, ...]:
        return (plan.template, *work.reading.templates)

    def purpose(self, result: SumsResult | CrossResult) -> RoundPurpose:
        return result.purpose


class LayerSums(_Reads):
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
        _check_purpose(result.purpose, work.purpose)
        reading = work.reading
        n_labels, n_folds = len(plan.labels), reading.n_folds
        counts = result.counts
        if len(counts) != n_folds or any(len(fold) != n_labels for fold in counts):
            raise WireError(f"counts must have shape [{n_folds}, {n_labels}]", field="counts", limit=n_folds)
        if sum(map(sum, counts)) != report.n_texts:
            raise WireError(
                f"counts are of {sum(map(sum, counts))} rows, expected the report's {report.n_texts}", field="counts"
            )
        _check_ranks(result, work)
        n_cells = sum(count > 0 for fold in counts for count in fold)
        n_embd = result.centres.shape[-1]
        sizes = (reading.n_readers, n_cells + sum(result.ranks), n_embd)
        check_shape(result.centres, (reading.n_readers, n_embd), "centres")
        if result.rows.shape != sizes or len(result.rows.data) != result.rows.n_bytes:
            raise WireError(
                f"rows has shape {list(result.rows.shape)} in {len(result.rows.data)} bytes, expected {list(sizes)} at "
                "half a byte a number",
                field="rows",
            )
        check_shape(result.rows.scales, (reading.n_readers, n_embd), "scales")
        if math.prod(result.rests.shape):
            check_shape(result.rests, (reading.n_readers, n_folds, n_embd), "rests")
        words = (reading.n_word_views, n_labels) if reading.n_word_views else result.word_means.shape
        check_shape(result.word_means, words, "word_means")
        # Over its root mean square, no element of a state is larger than √n_embd.
        largest = math.sqrt(n_embd) * (1 + ROUNDING)
        for field, array, low, high in (
            ("centres", result.centres, -largest, largest),
            ("scales", result.rows.scales, 0.0, largest * math.sqrt(max(report.n_texts, 1))),
            ("rests", result.rests, -ROUNDING, largest**2 * report.n_texts),
            ("word_means", result.word_means, -MAX_LOSS, ROUNDING),
        ):
            values = array.numpy()
            if values.size and not low <= values.min() <= values.max() <= high:
                raise WireError(
                    f"{field} has elements from {values.min():.3g} to {values.max():.3g}, expected {low:.3g} to "
                    f"{high:.3g}",
                    field=field,
                )
        check_losses(np.array([result.loss]), self.loss_range(plan, work), "loss")

    def mean_loss(self, result: SumsResult, n_texts: int) -> float:  # noqa: ARG002
        return result.loss


class LayerCross(_Reads):
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
        _check_purpose(result.purpose, work.purpose)
        check_shape(result.loss_sums, (work.coefficients.shape[0], work.reading.n_folds), "loss_sums")
        sums = result.loss_sums.numpy()
        highest = _largest_losses(plan, work) * report.n_texts
        if (sums.max(axis=1) > highest).any():
            raise WireError(
                f"loss_sums holds {sums.max():.3g}, expected at most {highest.max():.3g}", field="loss_sums"
            )
        if sums.min() < -ROUNDING * report.n_texts:
            raise WireError(f"loss_sums holds {sums.min():.3g}, expected 0 or more", field="loss_sums")

    def mean_loss(self, result: CrossResult, n_texts: int) -> float:
        """Of the best mixture."""
        return float(result.loss_sums.numpy().sum(axis=1).min()) / n_texts

    def scaled(self, result: CrossResult, share: float) -> CrossResult:
        return msgspec.structs.replace(result, loss_sums=Array.of(result.loss_sums.numpy() * share, "<f4"))

    def digest(self, work: CrossWork) -> str:
        """Without the classifiers: another BLAS may compute them with other last bits."""
        none = Array.of(np.zeros(0))
        return codec.digest(msgspec.structs.replace(work, weights=none, biases=none))


def _largest_losses(plan: RoundPlan, work: CrossWork) -> NDArray[np.float64]:
    """The largest loss [n_mixtures] of a row: a state over its root mean square has norm √n_embd."""
    weights = work.weights.numpy()
    of_states = math.sqrt(weights.shape[2]) * np.sqrt((weights**2).sum(axis=2)).max(axis=(0, 2), initial=0.0)
    columns = of_states + np.abs(work.biases.numpy()).max(axis=(0, 2), initial=0.0)
    of_words = MAX_LOSS + np.abs(work.centres.numpy()).max(initial=0.0)
    scales = np.abs(work.word_scales.numpy()).sum(axis=1)
    logits = np.abs(work.coefficients.numpy()) @ columns + scales * of_words
    found: NDArray[np.float64] = 2 * logits + math.log(max(len(plan.labels), 1))
    return max(plan.label_weights, default=1.0) * (found * (1 + ROUNDING) + ROUNDING)


def _check_purpose(got: FitPurpose, expected: FitPurpose) -> None:
    if got != expected:
        raise WireError(f"purpose is {got!r}, expected {expected!r}", field="purpose")


def _check_ranks(result: SumsResult, work: SumsWork) -> None:
    """A fold's factor has a row for each row of the fold less its labels, up to the most."""
    free = [sum(fold) - sum(count > 0 for count in fold) for fold in result.counts]
    expected = [min(each, work.max_rank) for each in free]
    # At most as many as there are dimensions.
    n_embd = result.centres.shape[-1]
    if list(result.ranks) != [min(each, n_embd) for each in expected]:
        raise WireError(f"ranks is {list(result.ranks)}, expected {expected}", field="ranks")
