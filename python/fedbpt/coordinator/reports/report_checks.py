"""What the coordinator checks of a device's reports. What a right result is, `fedbpt.coordinator.work_kinds` knows."""

from __future__ import annotations

import math

import numpy as np
from msgspec import UNSET

from fedbpt.coordinator.reports.report_bounds import evaluation_loss_range
from fedbpt.coordinator.work_kinds import kind_of
from fedbpt.coordinator.work_kinds.base import check_losses
from fedbpt.errors import WireError
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import (
    EvaluateReport,
    EvaluateRequest,
    MaskedResult,
    RoundPlan,
    RoundProgress,
    RoundReport,
)


def check_report(report: RoundReport, plan: RoundPlan, n_rows: int | None = None) -> None:
    """Raise `WireError` unless ``report`` answers ``plan``: the same ids and digest, and a possible result.

    ``n_rows``: training rows that the device said it has; None: unknown.
    """
    for field in ("run", "round", "device"):
        got, expected = getattr(report, field), getattr(plan, field)
        if got != expected:
            raise WireError(f"the report has {field} {got!r}, expected {expected!r}", field=field)
    if report.plan_digest != codec.digest(plan):
        raise WireError("plan_digest must be that of the plan sent", field="plan_digest")
    codec.check(report)
    if report.devices is not UNSET:
        raise WireError("devices must be left out: only a sum has them", field="devices")
    if plan.secure is not UNSET:
        _check_masked(report.result)
        _check_counts(report, plan, n_rows)
        return
    _check_counts(report, plan, n_rows)
    check_result(report, plan, n_rows)


def check_result(report: RoundReport, plan: RoundPlan, n_rows: int | None = None) -> None:
    """Raise `WireError` unless the report's result is a possible one of the plan's work."""
    result = report.result
    kind = kind_of(plan.work)
    if not isinstance(result, kind.result):
        raise WireError(f"result is a {type(result).__name__}, expected a {kind.result.__name__}", field="result")
    kind.check_result(report, result, plan, plan.work, n_rows)


def _check_masked(result: object) -> None:
    """Of a masked result only its shape can be checked."""
    if not isinstance(result, MaskedResult):
        raise WireError(f"result is a {type(result).__name__}, expected a masked one", field="result")
    numbers = sum(math.prod(field.shape) * field.bits // 8 for field in result.fields)
    if numbers != len(result.data):
        raise WireError(f"data has {len(result.data)} bytes, expected {numbers}", field="data")


def _check_counts(report: RoundReport, plan: RoundPlan, n_rows: int | None) -> None:
    """Rows are the report's weight; evaluations and tokens are charged to the run's budget."""
    work = plan.work
    kind = kind_of(plan.work)
    if n_rows is not None and report.n_texts > n_rows:
        raise WireError(
            f"n_texts is {report.n_texts}, expected at most the device's {n_rows} rows", field="n_texts", limit=n_rows
        )
    max_rows = kind.max_rows(work) if plan.privacy is None else 0
    for field, most in (
        ("n_texts", max_rows or report.n_texts),
        ("evaluations", kind.max_evaluations(plan, work)),
        ("tokens", kind.max_tokens(plan, work, report.n_texts)),
    ):
        count = getattr(report, field)
        if count > most:
            raise WireError(f"{field} is {count}, the plan asks for at most {most}", field=field, limit=most)


def check_evaluation(report: EvaluateReport, request: EvaluateRequest, n_rows: int | None = None) -> None:
    """Raise `WireError` unless ``report`` has possible counts for each latent of ``request``.

    ``n_rows``: rows of the split that the device said it has; None: unknown.
    """
    codec.check(report)
    if (report.masked is not UNSET) != (request.secure is not UNSET):
        raise WireError("masked must be given where the request is secure, and only there", field="masked")
    if report.masked is not UNSET:
        _check_masked(report.masked)
        return
    k = request.latents.shape[0]
    lengths = {"correct": k, "loss_sums": k, "difference_squares": k * (request.split == "held")}
    answered = k * (request.generation is not UNSET)
    for field, n_expected in {**lengths, "n_failed": answered, "n_distinct": answered}.items():
        n_entries = len(getattr(report, field) or ())
        if n_entries != n_expected:
            raise WireError(f"{field} has {n_entries} entries, expected {n_expected}", field=field)
    most = min(n for n in (n_rows, request.max_rows or None, report.n) if n is not None)
    if report.n > most:
        raise WireError(f"n is {report.n}, expected at most {most}", field="n", limit=most)
    for field in ("correct", "n_failed", "n_distinct"):
        count = max(getattr(report, field) or (0,))
        if count > report.n:
            raise WireError(f"{field} has {count} of {report.n} rows, expected at most {report.n}", field=field)
    low, high = evaluation_loss_range(request)
    check_losses(np.array(report.loss_sums) / report.n, (low, high), "loss_sums")
    if report.difference_squares:
        squares = np.array(report.difference_squares) / report.n
        check_losses(squares, (0.0, (high - low) ** 2), "difference_squares")


def check_progress(progress: RoundProgress) -> None:
    """Raise `WireError` where more steps are done than there are."""
    if progress.done > progress.total:
        raise WireError(f"done is {progress.done}, expected at most total, {progress.total}", field="done")
