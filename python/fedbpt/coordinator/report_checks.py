"""What a coordinator checks of a device's report, raising `WireError`, and what it reads off those of a round."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbpt.coordinator import report_bounds
from fedbpt.errors import WireError
from fedbpt.objective.losses import balanced_weights
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import (
    EvaluateReport,
    EvaluateRequest,
    FitResult,
    FitWork,
    LocalResult,
    LocalWork,
    PooledResult,
    PooledWork,
    RanksResult,
    RoundPlan,
    RoundProgress,
    RoundReport,
    SelectResult,
    SelectWork,
)
from fedbpt.protocol.specs import Array
from fedbpt.runs.events import RoundPurpose
from fedbpt.runs.result import Score
from fedbpt.search.local_search import farthest_move, sigma_squares_bounds

_RESULT_OF: Final[dict[type, type]] = {
    SelectWork: SelectResult, PooledWork: PooledResult, LocalWork: LocalResult, FitWork: FitResult,
}  # fmt: skip


def check_report(report: RoundReport, plan: RoundPlan, n_rows: int | None = None) -> None:
    """Raises `WireError` unless ``report`` answers ``plan``: the same ids and digest, a result that can be.

    ``n_rows``: training rows that the device said to have; None: it has not said.
    """
    for field in ("run", "round", "device"):
        got, wanted = getattr(report, field), getattr(plan, field)
        if got != wanted:
            raise WireError(f"the report is for {field} {got!r}, asked was {wanted!r}")
    if report.plan_digest != codec.digest(plan):
        raise WireError("the report's plan digest is another: it answers a plan that was not sent")
    codec.check(report)
    result, work = report.result, plan.work
    wanted_kind = _RESULT_OF[type(work)]
    if not isinstance(result, wanted_kind):
        raise WireError(f"the report holds a {type(result).__name__}, the plan asks for a {wanted_kind.__name__}")
    _check_counts(report, plan, n_rows)
    if isinstance(result, SelectResult) and isinstance(work, SelectWork):
        _check_selection(report, result, plan, work, n_rows)
    elif isinstance(result, PooledResult) and isinstance(work, PooledWork):
        _check_shape(result.losses, (work.popsize,), "losses")
        _check_losses(result.losses.numpy(), report_bounds.loss_range(plan))
    elif isinstance(result, FitResult) and isinstance(work, FitWork):
        _check_fit(result, plan, work)
    elif isinstance(result, LocalResult) and isinstance(work, LocalWork):
        _check_local(result, plan, work)


def _check_correct(result: SelectResult, plan: RoundPlan, n_texts: int) -> None:
    """Counts of right answers are of labels, and of no private run, whose noise they would undo."""
    told = bool(plan.labels) and plan.privacy is None
    if result.correct and not (told and len(result.correct) == result.loss_sums.shape[0]):
        raise WireError(
            f"the report counts right answers of {len(result.correct)} templates: asked was for none or all"
        )
    if max(result.correct, default=0) > n_texts:
        raise WireError("the report counts more right answers than texts")


def _check_counts(report: RoundReport, plan: RoundPlan, n_rows: int | None) -> None:
    """Rows are the report's weight, evaluations and tokens are charged to the run's budget: none may be made up."""
    if n_rows is not None and report.n_texts > n_rows:
        raise WireError(f"the report is of {report.n_texts} rows, the device said that it has {n_rows}")
    for counted, most, what in (
        (report.n_texts, report_bounds.most_rows(plan, report.n_texts), "rows"),
        (report.evaluations, report_bounds.most_evaluations(plan), "evaluations"),
        (report.tokens, report_bounds.most_tokens(plan, report.n_texts), "tokens"),
    ):
        if counted > most:
            raise WireError(f"the report counts {counted} {what}, the plan asks for {most} at most")


def _check_selection(
    report: RoundReport, result: SelectResult, plan: RoundPlan, work: SelectWork, n_rows: int | None
) -> None:
    n_templates, n_labels = len(work.templates), len(plan.labels) if work.by_label else 0
    _check_shape(result.loss_sums, (n_templates, n_labels) if n_labels else (n_templates,), "loss_sums")
    _check_correct(result, plan, report.n_texts)
    counts = result.label_counts
    fewest, most = (report.n_texts, n_rows or sum(counts)) if n_labels else (0, 0)
    if len(counts) != n_labels or not fewest <= sum(counts) <= most:
        raise WireError(
            f"label_counts of {len(counts)} labels and {sum(counts)} rows cannot be: asked was for {n_labels} labels of"
            f" {fewest} to {most} rows"
        )
    _check_losses(result.loss_sums.numpy() / report.n_texts, report_bounds.loss_range(plan))


def _check_fit(result: FitResult, plan: RoundPlan, work: FitWork) -> None:
    if result.purpose != work.purpose:
        raise WireError(f"the report is of a {result.purpose} fit, the plan asks for {work.purpose}")
    shape = (1 + len(work.others), 1 + work.n_words)
    _check_shape(result.means, shape if work.readout is None else (*shape, len(plan.labels)), "means")
    _check_losses(np.array([result.loss]), report_bounds.loss_range(plan))
    means = result.means.numpy()
    if (excess := np.abs(means) / report_bounds.means_bound(plan, work)).max() > 1:
        raise WireError(f"the report's means are {excess.max():.3g} times as large as they can be")
    if work.readout is None:
        squares = means[:, -1]
        if (squares * (1 + report_bounds.ROUNDING) + 1e-9 < (means[:, :-1] ** 2).sum(axis=1)).any():
            raise WireError("a mean of squares is smaller than the square of the mean")


def _check_local(result: LocalResult, plan: RoundPlan, work: LocalWork) -> None:
    _check_shape(result.mean, (plan.prompt.d,), "mean")
    if len(result.ranks) not in (0, work.iterations * work.popsize):
        raise WireError(f"{len(result.ranks)} ranks: the plan asks for those of {work.iterations} generations")
    _check_losses(np.array([result.fitness]), report_bounds.loss_range(plan))
    moved, most = float(np.linalg.norm(result.mean.numpy() - work.state.mean.numpy())), farthest_move(work)
    if moved > most:
        raise WireError(f"the report's mean lies {moved:.3g} from the plan's, it cannot be more than {most:.3g}")
    low, high = sigma_squares_bounds(work)
    if not low * (1 - report_bounds.ROUNDING) <= result.sigma_squares <= high * (1 + report_bounds.ROUNDING):
        raise WireError(f"sigma_squares {result.sigma_squares:.3g} cannot be: it lies between {low:.3g} and {high:.3g}")


def _check_losses(losses: NDArray[np.float64], allowed: tuple[float, float]) -> None:
    low, high = allowed
    if not (low <= losses.min() and losses.max() <= high):
        worst = losses.min() if losses.min() < low else losses.max()
        raise WireError(f"the report holds a loss of {worst:.3g}, outside the bounds of {low:.3g} and {high:.3g}")


def check_evaluation(report: EvaluateReport, request: EvaluateRequest, n_rows: int | None = None) -> None:
    """Raises `WireError` unless ``report`` has counts that can be for each latent of ``request``.

    ``n_rows``: rows of the split that the device said to have; None: it has not said.
    """
    codec.check(report)
    k = request.latents.shape[0]
    if len(report.correct) != k or len(report.loss_sums) != k:
        raise WireError(f"the evaluation has {len(report.correct)} counts, asked was for {k}")
    most = min(n for n in (n_rows, request.max_rows or None, report.n) if n is not None)
    if max(report.correct) > report.n or report.n > most:
        raise WireError("the evaluation's counts cannot be: more correct than rows, or more rows than there are")
    _check_losses(np.array(report.loss_sums) / report.n, report_bounds.evaluation_loss_range(request))


def check_progress(progress: RoundProgress) -> None:
    """Raises `WireError` where more steps are done than there are."""
    if progress.done > progress.total:
        raise WireError(f"{progress.done} of {progress.total} steps cannot be done")


def _check_shape(array: Array, shape: tuple[int, ...], name: str) -> None:
    if array.shape != shape:
        raise WireError(f"{name} has shape {list(array.shape)}, the plan asks for {list(shape)}")


def purpose_of(reports: Sequence[RoundReport]) -> RoundPurpose:
    """What a closed round was for."""
    result = reports[0].result
    if isinstance(result, SelectResult):
        return "selection"
    return result.purpose if isinstance(result, FitResult) else "search"


def cap_rows(counts: Sequence[int], cap: float) -> NDArray[np.float64]:
    """What of each device's number of rows counts: ``cap`` times the median number at most; 0: all of it."""
    most = cap * statistics.median(counts) if cap else math.inf
    return np.minimum(np.array(counts, dtype=np.float64), np.maximum(np.floor(most), 1.0))


def cap_reports(reports: Sequence[RoundReport], cap: float) -> list[RoundReport]:
    """``reports`` whose ``n_texts`` are those of `cap_rows`, with the losses summed over them to match."""
    capped = []
    for report, n in zip(reports, cap_rows([report.n_texts for report in reports], cap), strict=True):
        if n < report.n_texts:
            result = report.result
            if isinstance(result, SelectResult):
                sums = result.loss_sums.numpy() * (n / report.n_texts)
                result = msgspec.structs.replace(result, loss_sums=Array.of(sums))
            report = msgspec.structs.replace(report, n_texts=int(n), result=result)
        capped.append(report)
    return capped


def evaluation_loss(reports: Sequence[EvaluateReport], cap: float, which: int = 0) -> float:
    """Mean loss of latent ``which`` over all devices' rows, nats, as far as `cap_rows` lets them count."""
    counts = np.array([report.n for report in reports])
    shares = cap_rows(counts.tolist(), cap) / counts
    total = sum(share * report.loss_sums[which] for share, report in zip(shares, reports, strict=True))
    return float(total / (shares * counts).sum())


def label_weights(reports: Sequence[RoundReport], cap: float = 0.0) -> tuple[float, ...]:
    """Of a row's loss, by all devices' label counts; empty where they were not asked for. ``cap``: see `cap_rows`."""
    given = [report.result.label_counts for report in reports if isinstance(report.result, SelectResult)]
    if not any(given):
        return ()
    counts = np.array(given, dtype=np.float64)
    shares = cap_rows([sum(each) for each in given], cap) / np.maximum(counts.sum(axis=1), 1.0)
    # a label that a device has keeps a row: else one that claims a billion rows of others would make it weigh a billion
    counts = np.where(counts > 0, np.maximum(counts * shares[:, None], 1.0), 0.0)
    return tuple(balanced_weights(counts.sum(axis=0)).tolist())


def template_losses(
    reports: Sequence[RoundReport], weights: Sequence[float], robust: bool = False
) -> NDArray[np.float64]:
    """Mean loss of each template over all devices' rows, nats [n_templates]; ``weights``: of its parts by label.

    ``robust``: the median of the devices' mean losses instead.
    """
    sums = np.stack([r.result.loss_sums.numpy() for r in reports if isinstance(r.result, SelectResult)])
    if weights:
        sums = (sums * np.array(weights)).sum(axis=2)
    counts = np.array([report.n_texts for report in reports])
    found: NDArray[np.float64] = (
        np.median(sums / counts[:, None], axis=0) if robust else sums.sum(axis=0) / counts.sum()
    )
    return found


def template_scores(reports: Sequence[RoundReport], losses: Sequence[float]) -> tuple[Score, ...]:
    """What each template scored without a prompt, over the devices that count right answers; empty: none does.

    ``losses`` [n_templates]: as `template_losses` has them.
    """
    counted = [
        (r.result.correct, r.n_texts) for r in reports if isinstance(r.result, SelectResult) and r.result.correct
    ]
    if not counted:
        return ()
    n, correct = sum(n for _, n in counted), np.sum([right for right, _ in counted], axis=0)
    return tuple(Score(n=n, correct=int(c), loss_sum=n * loss) for c, loss in zip(correct, losses, strict=True))


def mean_loss(reports: Sequence[RoundReport]) -> float:
    total = 0.0
    for report in reports:
        match report.result:
            case PooledResult(losses=losses):
                value = float(losses.numpy().mean())
            case LocalResult(fitness=fitness) | RanksResult(fitness=fitness):
                value = fitness
            case SelectResult(loss_sums=sums):
                value = float(sums.numpy().reshape(sums.shape[0], -1).sum(axis=1).min()) / report.n_texts
            case FitResult(loss=loss):
                value = loss
        total += value * report.n_texts
    return total / sum(report.n_texts for report in reports)
