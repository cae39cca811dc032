"""What the coordinator reads from the reports of a round, or of an evaluation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import msgspec
import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from fedbpt.aggregation.base import weighted_sum
from fedbpt.aggregation.bounded import bounded, bounded_losses, levelled
from fedbpt.coordinator.work_kinds import kind_of_result
from fedbpt.objective.losses import balanced_weights
from fedbpt.protocol.rounds import EvaluateReport, PooledResult, RoundReport, SelectResult
from fedbpt.protocol.specs import Array
from fedbpt.runs.events import RoundPurpose
from fedbpt.runs.result import Score


def purpose_of(reports: Sequence[RoundReport]) -> RoundPurpose:
    """The purpose of the round that ``reports`` closed."""
    result = reports[0].result
    return kind_of_result(result).purpose(result)


def mean_loss(reports: Sequence[RoundReport]) -> float:
    """Mean loss of the devices, weighted by rows, nats."""
    total = 0.0
    for report in reports:
        total += kind_of_result(report.result).mean_loss(report.result, report.n_texts) * report.n_texts
    return total / sum(report.n_texts for report in reports)


# --- the cap on rows -------------------------------------------------------------------------------------------------


def cap_rows(counts: Sequence[int], cap: float) -> NDArray[np.float64]:
    """``counts`` of rows by device, limited to ``cap`` times their median; 0: no limit."""
    most = cap * statistics.median(counts) if cap else math.inf
    return np.minimum(np.array(counts, dtype=np.float64), np.maximum(np.floor(most), 1.0))


def cap_reports(reports: Sequence[RoundReport], cap: float) -> list[RoundReport]:
    """``reports`` with ``n_texts`` limited as by `cap_rows`, and sums over rows scaled to match."""
    capped = []
    for report, n in zip(reports, cap_rows([report.n_texts for report in reports], cap), strict=True):
        if n < report.n_texts:
            result = kind_of_result(report.result).scaled(report.result, n / report.n_texts)
            report = msgspec.structs.replace(report, n_texts=int(n), result=result)
        capped.append(report)
    return capped


def level_reports(reports: Sequence[RoundReport]) -> list[RoundReport]:
    """``reports`` of a generation that all devices scored, their losses `levelled`; others as they are."""
    results = [report.result for report in reports if isinstance(report.result, PooledResult)]
    sizes = {result.losses.shape for result in results}
    if len(results) < len(reports) or len(sizes) != 1:  # of another method, or refused by the aggregator
        return list(reports)
    level = levelled(np.stack([result.losses.numpy() for result in results]))
    return [
        msgspec.structs.replace(report, result=PooledResult(losses=Array.of(losses)))
        for report, losses in zip(reports, level, strict=True)
    ]


def evaluation_loss(reports: Sequence[EvaluateReport], cap: float, which: int = 0, checked: bool = False) -> float:
    """Mean loss of latent ``which`` over all devices' rows, nats; rows count as far as `cap_rows` lets them.

    ``checked``: what one device decides is bounded.
    """
    capped = cap_rows([report.n for report in reports], cap)
    means = np.array([[report.loss_sums[which] / report.n] for report in reports])
    return float(weighted_sum(capped / capped.sum(), bounded(means) if checked else means)[0])


def held_differences(
    reports: Sequence[EvaluateReport], cap: float | None = None
) -> tuple[int, list[float], list[float]]:
    """Held rows: their number, and of each latent's loss less that of latent 0 the mean and the variance, nats a row.

    ``cap``: rows count as far as `cap_rows` lets them, and what one device decides is bounded; None: neither.
    """
    if not reports:
        return 0, [], []
    losses = np.array([report.loss_sums for report in reports], dtype=np.float64)
    sums = losses - losses[:, :1]
    squares = np.array([report.difference_squares for report in reports], dtype=np.float64)
    counts = np.array([report.n for report in reports], dtype=np.float64)
    if cap is None:
        means = sums.sum(axis=0) / counts.sum()
        variances = np.maximum(squares.sum(axis=0) / counts.sum() - means**2, 0.0)
        return int(counts.sum()), means.tolist(), variances.tolist()
    capped = cap_rows([report.n for report in reports], cap)
    shares = (capped / capped.sum())[:, None]
    of_devices = sums / counts[:, None]
    within = bounded(np.maximum(squares / counts[:, None] - of_devices**2, 0.0))
    of_devices = bounded(of_devices)
    means = (shares * of_devices).sum(axis=0)
    variances = (shares * (within + (of_devices - means) ** 2)).sum(axis=0)
    return int(capped.sum()), means.tolist(), variances.tolist()


# --- the selection ---------------------------------------------------------------------------------------------------


def label_weights(reports: Sequence[RoundReport], cap: float = 0.0) -> tuple[float, ...]:
    """Weight of a row's loss by its label, from all devices' label counts; empty without counts.

    ``cap``: see `cap_rows`.
    """
    given = [report.result.label_counts for report in reports if isinstance(report.result, SelectResult)]
    if not any(given):
        return ()
    counts = np.array(given, dtype=np.float64)
    shares = cap_rows([sum(each) for each in given], cap) / np.maximum(counts.sum(axis=1), 1.0)
    # A label that a device has keeps one row: otherwise a device that claims a billion rows of the other labels would
    # make it weigh a billion.
    counts = np.where(counts > 0, np.maximum(counts * shares[:, None], 1.0), 0.0)
    return tuple(balanced_weights(counts.sum(axis=0)).tolist())


def template_losses(
    reports: Sequence[RoundReport], weights: Sequence[float], robust: bool = False, checked: bool = False
) -> NDArray[np.float64]:
    """Mean loss of each template over all devices' rows, nats [n_templates].

    ``weights``: of the losses by label, see `label_weights`. ``robust``: the median of the devices' means instead.
    ``checked``: what one device decides is bounded.
    """
    sums = np.stack([r.result.loss_sums.numpy() for r in reports if isinstance(r.result, SelectResult)])
    if weights:
        sums = (sums * np.array(weights)).sum(axis=2)
    counts = np.array([report.n_texts for report in reports])
    if robust:
        medians: NDArray[np.float64] = np.median(sums / counts[:, None], axis=0)
        return medians
    if checked:
        return bounded_losses(sums / counts[:, None], counts / counts.sum())
    means: NDArray[np.float64] = sums.sum(axis=0) / counts.sum()
    return means


def template_rewards(reports: Sequence[RoundReport]) -> tuple[int, NDArray[np.float64]]:
    """Answers that the devices measured, and the sums [n_templates] of their values by the task's metric."""
    found = [(r.result.n_answered, r.result.reward_sums) for r in reports if isinstance(r.result, SelectResult)]
    measured = [(n, sums.numpy()) for n, sums in found if n is not UNSET and sums is not UNSET]
    if not measured:
        return 0, np.zeros(0)
    total: NDArray[np.float64] = np.sum([sums for _, sums in measured], axis=0)
    return sum(n for n, _ in measured), total


def template_scores(reports: Sequence[RoundReport], losses: Sequence[float]) -> tuple[Score, ...]:
    """Score of each template without a prompt, over the devices that count right answers; empty: none does.

    ``losses`` [n_templates]: of `template_losses`.
    """
    counted = [
        (r.result.correct, r.n_texts) for r in reports if isinstance(r.result, SelectResult) and r.result.correct
    ]
    if not counted:
        return ()
    n = sum(n for _, n in counted)
    correct = np.sum([right for right, _ in counted], axis=0)
    return tuple(Score(n=n, correct=int(c), loss_sum=n * loss) for c, loss in zip(correct, losses, strict=True))
