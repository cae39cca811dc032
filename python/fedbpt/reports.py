"""What a coordinator checks of a device's report, raising `WireError`, and what it reads off those of a round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedbpt import wire
from fedbpt.errors import WireError
from fedbpt.losses import balanced_weights
from fedbpt.messages import (
    Array,
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
    RoundReport,
    SelectResult,
    SelectWork,
)
from fedbpt.runs import RoundPurpose, Score

MAX_LOSS: Final = 1e4
"""Nats (or hinge units) of a row before its weight: logits that give more are of no model. Not of a perturbed ratio."""

_RESULT_OF: Final[dict[type, type]] = {
    SelectWork: SelectResult, PooledWork: PooledResult, LocalWork: LocalResult, FitWork: FitResult,
}  # fmt: skip


def check_report(report: RoundReport, plan: RoundPlan, n_rows: int | None = None) -> None:
    """Raises `WireError` unless ``report`` answers ``plan``: the same ids and digest, a fitting and finite result.

    ``n_rows``: training rows that the device said to have; None: it has not said.
    """
    for field in ("run", "round", "device"):
        got, wanted = getattr(report, field), getattr(plan, field)
        if got != wanted:
            raise WireError(f"the report is for {field} {got!r}, asked was {wanted!r}")
    if report.plan_digest != wire.digest(plan):
        raise WireError("the report's plan digest is another: it answers a plan that was not sent")
    wire.check(report)
    wanted_kind = _RESULT_OF[type(plan.work)]
    _check_counts(report, plan, n_rows)
    result = report.result
    if not isinstance(result, wanted_kind):
        raise WireError(f"the report holds a {type(result).__name__}, the plan asks for a {wanted_kind.__name__}")
    if isinstance(result, SelectResult) and isinstance(plan.work, SelectWork):
        n_templates, n_labels = len(plan.work.templates), len(plan.labels) if plan.work.by_label else 0
        _check_shape(result.loss_sums, (n_templates, n_labels) if n_labels else (n_templates,), "loss_sums")
        _check_correct(result, plan, report.n_texts)
        if len(result.label_counts) != n_labels or sum(result.label_counts) < report.n_texts * bool(n_labels):
            raise WireError(f"label_counts {list(result.label_counts)} cannot be: asked was for {n_labels} labels")
    elif isinstance(result, PooledResult) and isinstance(plan.work, PooledWork):
        _check_shape(result.losses, (plan.work.popsize,), "losses")
    elif isinstance(result, FitResult) and isinstance(plan.work, FitWork):
        if result.purpose != plan.work.purpose:
            raise WireError(f"the report is of a {result.purpose} fit, the plan asks for {plan.work.purpose}")
        shape = (1 + len(plan.work.others), 1 + plan.work.n_words)
        _check_shape(result.means, shape if plan.work.readout is None else (*shape, len(plan.labels)), "means")
        if plan.work.readout is None and result.means.numpy()[:, -1].min() < 0:
            raise WireError("a mean of squares is negative")
    elif isinstance(result, LocalResult):
        _check_shape(result.mean, (plan.prompt.d,), "mean")
        if isinstance(plan.work, LocalWork) and len(result.ranks) not in (0, plan.work.iterations * plan.work.popsize):
            raise WireError(f"{len(result.ranks)} ranks: the plan asks for those of {plan.work.iterations} generations")
    if plan.objective.perturb == 0:
        _check_losses(report, max(plan.label_weights, default=1.0))


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
    """Rows are the report's weight, evaluations are charged to the run's budget: neither may be made up."""
    if n_rows is not None and report.n_texts > n_rows:
        raise WireError(f"the report is of {report.n_texts} rows, the device said that it has {n_rows}")
    work = plan.work
    if isinstance(work, SelectWork):
        most = len(work.templates) * max(1, len(plan.labels))
    elif isinstance(work, FitWork):
        most = 1 + len(work.others)
    elif isinstance(work, LocalWork):
        most = work.popsize * work.iterations + 1
    else:
        most = work.popsize if isinstance(work, PooledWork) else work.history.popsize
    if report.evaluations > most:
        raise WireError(f"the report counts {report.evaluations} evaluations, the plan asks for {most} at most")


def _check_losses(report: RoundReport, largest_weight: float) -> None:
    result = report.result
    if isinstance(result, SelectResult):
        values = result.loss_sums.numpy() / report.n_texts
    elif isinstance(result, PooledResult):
        values = result.losses.numpy()
    else:
        values = np.array([result.loss if isinstance(result, FitResult) else result.fitness])
    if (worst := float(np.abs(values).max())) > (bound := MAX_LOSS * largest_weight):
        raise WireError(f"the report holds a loss of {worst:.3g}, over the bound of {bound:.3g}")


def check_evaluation(report: EvaluateReport, request: EvaluateRequest) -> None:
    """Raises `WireError` unless ``report`` has counts that can be for each latent of ``request``."""
    wire.check(report)
    k = request.latents.shape[0]
    if len(report.correct) != k or len(report.loss_sums) != k:
        raise WireError(f"the evaluation has {len(report.correct)} counts, asked was for {k}")
    if max(report.correct) > report.n or (request.max_rows and report.n > request.max_rows):
        raise WireError("the evaluation's counts cannot be: more correct than rows, or more rows than asked")


def _check_shape(array: Array, shape: tuple[int, ...], name: str) -> None:
    if array.shape != shape:
        raise WireError(f"{name} has shape {list(array.shape)}, the plan asks for {list(shape)}")


def purpose_of(reports: Sequence[RoundReport]) -> RoundPurpose:
    """What a closed round was for."""
    result = reports[0].result
    if isinstance(result, SelectResult):
        return "selection"
    return result.purpose if isinstance(result, FitResult) else "search"


def label_weights(reports: Sequence[RoundReport]) -> tuple[float, ...]:
    """Of a row's loss, by all devices' label counts; empty where they were not asked for."""
    counts = [report.result.label_counts for report in reports if isinstance(report.result, SelectResult)]
    return tuple(balanced_weights(np.sum(counts, axis=0)).tolist()) if any(counts) else ()


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
