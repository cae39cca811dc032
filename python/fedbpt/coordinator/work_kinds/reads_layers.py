"""What the kinds of work that read hidden states have in common."""

from __future__ import annotations

import math

from fedbpt.coordinator.reports.report_bounds import ROUNDING
from fedbpt.coordinator.work_kinds.base import WorkKind
from fedbpt.errors import WireError
from fedbpt.protocol.rounds import (
    CrossResult,
    FitPurpose,
    LayersWork,
    LogisticResult,
    MomentsResult,
    RoundPlan,
    SketchResult,
    SumsResult,
)
from fedbpt.protocol.specs import Array, Quantized, Template
from fedbpt.runs.events import RoundPurpose


class ReadsLayers(WorkKind):  # type: ignore[type-arg]  # of one of these works
    """Devices read rows, or have read them already."""

    def max_evaluations(self, plan: RoundPlan, work: LayersWork) -> int:  # noqa: ARG002
        return work.reading.n_views

    def max_texts(self, plan: RoundPlan, work: LayersWork, n_texts: int) -> int:  # noqa: ARG002
        return work.reading.n_views * n_texts

    def max_rows(self, work: LayersWork) -> int:
        return work.reading.max_rows

    def templates(self, plan: RoundPlan, work: LayersWork) -> tuple[Template, ...]:
        return (plan.template, *work.reading.templates)

    def purpose(self, result: SumsResult | CrossResult | MomentsResult | LogisticResult | SketchResult) -> RoundPurpose:
        return result.purpose


def check_purpose(got: FitPurpose, expected: FitPurpose) -> None:
    """Raise `WireError` unless the purposes are equal."""
    if got != expected:
        raise WireError(f"purpose is {got!r}, expected {expected!r}", field="purpose")


def largest_state(n_embd: int) -> float:
    """The largest element that a state can have: it is over its root mean square."""
    return math.sqrt(n_embd) * (1 + ROUNDING)


def check_range(array: Array | Quantized, low: float, high: float, field: str) -> None:
    """Raise `WireError` unless all elements of ``array`` lie within ``low`` and ``high``."""
    values = array.numpy()
    if values.min(initial=low) < low or values.max(initial=low) > high:
        worst = values.min() if values.min() < low else values.max()
        raise WireError(f"{field} has an element of {worst:.3g}, expected {low:.3g} to {high:.3g}", field=field)
