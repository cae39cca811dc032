"""What the coordinator asks of an aggregation algorithm, and the checks that all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedbpt.errors import InputError
from fedbpt.protocol.rounds import FitPurpose, Result, RoundReport, SearchHistory, Work
from fedbpt.protocol.specs import Readout

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
        """The latent [d] to use: the search's mean, not the best sample."""
        ...

    @property
    def evaluations(self) -> int:
        """Candidates that a device has scored so far: each round's most among its reports, summed."""
        ...

    def work(self, round: int) -> Work:
        """What every device does in this round; rounds count from 0 and name the generation."""
        ...

    def history(self) -> SearchHistory | None:
        """What devices can make `work` from themselves by replaying it; None: they cannot."""
        ...

    def update(self, reports: Sequence[RoundReport]) -> None:
        """Close a round. Raises `InputError`, and changes nothing, for reports that do not fit."""
        ...

    def restart(self, mean: NDArray[np.float64]) -> None:
        """Search anew from ``mean`` [d], with nothing learned of step size and covariance."""
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
    def readout(self) -> Readout:
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
    """Reports in order of device name, with their results.

    Raises:
        InputError: fewer than ``least``, a device twice, a result of another kind.
    """
    if len(reports) < least:
        raise InputError(f"this round needs reports of at least {least} devices, got {len(reports)}")
    ordered = sorted(reports, key=lambda report: report.device)
    pairs: list[tuple[RoundReport, R]] = []
    for before, report in zip([None, *ordered], ordered, strict=False):
        if before is not None and before.device == report.device:
            raise InputError(f"device {report.device} reported twice in one round")
        if not isinstance(report.result, kind):
            raise InputError(f"device {report.device} sent {type(report.result).__name__}, not {kind.__name__}")
        pairs.append((report, report.result))
    return pairs


def latents_of(
    pairs: Sequence[tuple[RoundReport, R]], arrays: Sequence[NDArray[np.float64]], size: int, what: str
) -> NDArray[np.float64]:
    """``arrays`` [size] each, stacked [len, size]; raises `InputError` naming the device whose shape is wrong."""
    for (report, _), values in zip(pairs, arrays, strict=True):
        if values.shape != (size,):
            raise InputError(f"device {report.device} sent {what} of shape {list(values.shape)}, expected [{size}]")
    return np.stack(arrays)


def weights_of(pairs: Sequence[tuple[RoundReport, R]]) -> NDArray[np.float64]:
    """Each device's share of the texts behind the reports; sums to 1."""
    counts = np.array([report.n_texts for report, _ in pairs], dtype=np.float64)
    shares: NDArray[np.float64] = counts / counts.sum()
    return shares


def weighted_sum(weights: NDArray[np.float64], rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Σ_k weights[k]·rows[k], added in order (no BLAS), so that its bits are the same everywhere."""
    total = np.zeros(rows.shape[1])
    for weight, row in zip(weights, rows, strict=True):
        total += weight * row
    return total
