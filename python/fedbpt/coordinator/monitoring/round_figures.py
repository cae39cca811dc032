"""The figures of a closed round that curves and the dashboard show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from msgspec import UNSET

from fedbpt.aggregation.methods import method_named
from fedbpt.coordinator.reports.round_reports import mean_loss, purpose_of
from fedbpt.protocol.rounds import RoundReport
from fedbpt.runs.events import RoundPurpose
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import StoredRound


class Share(NamedTuple):
    """One device's part in a round. ``loss``: mean over its rows and candidates, nats; None: only a sum is known.

    Of a sum, tokens are divided among its devices.
    """

    device: str
    tokens: int
    seconds: float
    loss: float | None


class ClosedRound(NamedTuple):
    """``evaluations``: most candidates that a device scored; ``loss``: mean of the devices, weighted by rows, nats."""

    round: int
    purpose: RoundPurpose
    evaluations: int
    loss: float
    shares: tuple[Share, ...]


def evaluations_in(closed: ClosedRound, settings: RunSettings) -> int:
    """Candidates of a round of the search; in pooled search, all devices score the same ones."""
    return closed.evaluations if method_named(settings.method).local else settings.popsize


def numbers_of(closed: StoredRound) -> ClosedRound:
    reports = closed.reports
    return ClosedRound(
        closed.round,
        purpose_of(reports),
        max(report.evaluations for report in reports),
        mean_loss(reports),
        tuple(share for report in reports for share in _shares(report)),
    )


def _shares(report: RoundReport) -> Iterator[Share]:
    if report.devices is UNSET:
        yield Share(report.device, report.tokens, report.seconds, mean_loss([report]))
        return
    names = report.devices
    for place, name in enumerate(names):
        tokens = report.tokens * (place + 1) // len(names) - report.tokens * place // len(names)
        yield Share(name, tokens, report.seconds, None)
