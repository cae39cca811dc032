"""`Aggregator` and `Fit`, and the checks that their implementations share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from fedbpt.errors import InputError
from fedbpt.protocol.rounds import FitPurpose, Result, RoundReport, SearchHistory, Work
from fedbpt.protocol.specs import LayerReadout, Readout

R = TypeVar("R", bound=Result)


@runtime_checkable
class Aggregator(Protocol):
    """Turns one round's reports into the next round's work.

    Deterministic: the same settings and the same sequence of updates give the same `digest`, so that a run resumes by
    replaying its stored reports. The order of reports within a round does not matter.
    """

    min_reports: int
    """Fewest reports that `update` works with."""

    @property
    def mean(self) -> NDArray[np.float64]:
        """The latent [d] to ship: the search's mean, not the best sample."""
        ...

    @property
    def evaluations(self) -> int:
        """Candidates that a device has scored so far: the sum over rounds of the most in a report."""
        ...

    def work(self, round: int) -> Work:
        """What every device does in ``round``."""
        ...

    def history(self) -> SearchHistory | None:
        """The history from which devices can make `work` by replaying it; None: they cannot."""
        ...

    def update(self, reports: Sequence[RoundReport]) -> None:
        """Close a round. Raises `InputError`, and changes nothing, for reports that do not fit."""
        ...

    def restart(self, mean: NDArray[np.float64]) -> None:
        """Restart from ``mean`` [d], with the initial step size and covariance."""
        ...

    def digest(self) -> str:
        """sha256 (hex) of everything that decides what comes next."""
        ...


class Fit(Protocol):
    """Fits a readout over the devices in several exchanges, each of them a round; deterministic, as an `Aggregator`."""

    purpose: FitPurpose
    min_reports: int
    """Fewest reports that `update` works with."""
    done: bool

    @property
    def readout(self) -> Readout | LayerReadout:
        """The best readout so far."""
        ...

    def work(self) -> Work:
        """What every device does in the next exchange."""
        ...

    def update(self, reports: Sequence[RoundReport]) -> None:
        """Close an exchange. Raises `InputError`, and changes nothing, for reports that do not fit."""
        ...

    def digest(self) -> str:
        """sha256 (hex) of everything that decides what comes next."""
        ...


def accepted(reports: Sequence[RoundReport], kind: type[R], least: int) -> list[tuple[RoundReport, R]]:
    """The reports with their results, in order of device name.

    Raises:
        InputError: fewer than ``least`` reports, two of one device, a result of another type.
    """
    if len(reports) < least:
        raise InputError(f"expected reports of at least {least} devices, got {len(reports)}", limit=least)
    ordered = sorted(reports, key=lambda report: report.device)
    pairs: list[tuple[RoundReport, R]] = []
    for before, report in zip([None, *ordered], ordered, strict=False):
        if before is not None and before.device == report.device:
            raise InputError(f"device {report.device} reported twice in one round: expected one report", field="device")
        if not isinstance(report.result, kind):
            raise InputError(
                f"device {report.device} sent a {type(report.result).__name__}, expected a {kind.__name__}",
                field="result",
            )
        pairs.append((report, report.result))
    return pairs


def latents_of(
    pairs: Sequence[tuple[RoundReport, R]], arrays: Sequence[NDArray[np.float64]], size: int, field: str
) -> NDArray[np.float64]:
    """``arrays``, of shape [size] for each of ``pairs``, stacked [len, size]; raises `InputError` for other shapes."""
    for (report, _), values in zip(pairs, arrays, strict=True):
        if values.shape != (size,):
            raise InputError(
                f"device {report.device} sent {field} of shape {list(values.shape)}, expected [{size}]", field=field
            )
    return np.stack(arrays)


def devices_of(report: RoundReport) -> tuple[str, ...]:
    """The device that reported, or of a sum all devices in it."""
    return (report.device,) if report.devices is UNSET else report.devices


def weights_of(pairs: Sequence[tuple[RoundReport, R]]) -> NDArray[np.float64]:
    """Each device's share of the texts behind the reports [K]; sums to 1."""
    counts = np.array([report.n_texts for report, _ in pairs], dtype=np.float64)
    shares: NDArray[np.float64] = counts / counts.sum()
    return shares


def weighted_sum(weights: NDArray[np.float64], rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Σ_k weights[k]·rows[k], added in order (no BLAS), so that its bits are the same everywhere."""
    total = np.zeros(rows.shape[1])
    for weight, row in zip(weights, rows, strict=True):
        total += weight * row
    return total
