"""`WorkKind`: what the coordinator knows about one type of `Work`, and the checks that several types share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedbpt.coordinator.reports import report_bounds
from fedbpt.errors import WireError
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import Result, RoundPlan, RoundReport, Work
from fedbpt.protocol.specs import Array, Readout, Template
from fedbpt.runs.events import RoundPurpose

W = TypeVar("W", bound=Work)
R = TypeVar("R", bound=Result)


class WorkKind(ABC, Generic[W, R]):
    """The bounds of a report on one type of work, and what is read from its result.

    Attributes:
        work, result: the message types.
        searches: candidates of the search are scored on mini-batches.
    """

    work: type[W]
    result: type[R]
    searches = False

    # --- bounds of a report --------------------------------------------------------------------------------------

    @abstractmethod
    def check_result(self, report: RoundReport, result: R, plan: RoundPlan, work: W, n_rows: int | None) -> None:
        """Raise `WireError` unless ``result``, of ``report``, has the shape and the size of a result of ``work``.

        ``n_rows``: training rows that the device said it has; None: unknown.
        """

    @abstractmethod
    def max_evaluations(self, plan: RoundPlan, work: W) -> int:
        """Most candidates that a device scores."""

    @abstractmethod
    def max_texts(self, plan: RoundPlan, work: W, n_texts: int) -> int:
        """Most texts that are put through the model for a result of ``n_texts`` rows, each as often as it is scored."""

    def max_rows(self, work: W) -> int:  # noqa: ARG002
        """Most rows behind a result that is not private; 0: no limit."""
        return 0

    def templates(self, plan: RoundPlan, work: W) -> tuple[Template, ...]:  # noqa: ARG002
        """The templates that texts are put into."""
        return (plan.template,)

    def readout(self, work: W) -> Readout | None:  # noqa: ARG002
        """The readout that the loss is computed with, apart from the plan's bias."""
        return None

    def loss_range(self, plan: RoundPlan, work: W) -> tuple[float, float]:
        """Smallest and largest mean loss of a row: nats, hinge units, or a perturbed ratio."""
        if self.searches and plan.objective.perturb:
            return report_bounds.RATIO_RANGE
        return report_bounds.plan_loss_range(plan, self.readout(work))

    def max_tokens(self, plan: RoundPlan, work: W, n_texts: int) -> int:
        """Most forward tokens of a result of ``n_texts`` rows."""
        passes = 2 if self.searches and plan.objective.perturb else 1
        a_text = report_bounds.max_tokens_of_a_text(plan, self.templates(plan, work))
        return passes * self.max_texts(plan, work, n_texts) * a_text

    # --- readings of a result ------------------------------------------------------------------------------------

    @abstractmethod
    def mean_loss(self, result: R, n_texts: int) -> float:
        """Mean loss over the rows (and candidates), nats."""

    def purpose(self, result: R) -> RoundPurpose:  # noqa: ARG002
        """The purpose of the round that ``result`` is from."""
        return "search"

    def scaled(self, result: R, share: float) -> R:  # noqa: ARG002
        """``result`` as of ``share`` of its rows: sums over rows shrink, means stay."""
        return result

    # --- the next plan -------------------------------------------------------------------------------------------

    def digest(self, work: W) -> str:
        """sha256 (hex) by which a stored round knows ``work`` again."""
        return codec.digest(work)

    def check_work(self, plan: RoundPlan, work: W) -> None:
        """Raise `FedbptError`, `ValueError` or `ArithmeticError` for work that no device could begin."""


def max_batch(plan: RoundPlan, n_texts: int) -> int:
    """Texts of a mini-batch on a device with ``n_texts`` rows."""
    return min(plan.texts or n_texts, n_texts)


def check_shape(array: Array, shape: tuple[int, ...], field: str) -> None:
    """Raise `WireError` unless ``array`` has ``shape``."""
    if array.shape != shape:
        raise WireError(f"{field} has shape {list(array.shape)}, expected {list(shape)}", field=field)


def check_losses(losses: NDArray[np.float64], allowed: tuple[float, float], field: str) -> None:
    """Raise `WireError` unless all ``losses`` lie within ``allowed``."""
    low, high = allowed
    if not (low <= losses.min() and losses.max() <= high):
        worst = losses.min() if losses.min() < low else losses.max()
        raise WireError(f"{field} holds a loss of {worst:.3g}, expected {low:.3g} to {high:.3g}", field=field)
