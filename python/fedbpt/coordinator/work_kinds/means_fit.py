"""The exchanges of a readout with privacy: `PublicWork` and `PublicResult`, `MeansWork` and `MeansResult`."""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np

from fedbpt.coordinator.reports.report_bounds import MAX_LOSS, ROUNDING
from fedbpt.coordinator.work_kinds.base import WorkKind, check_shape
from fedbpt.coordinator.work_kinds.reads_layers import check_purpose, check_range, largest_state
from fedbpt.errors import WireError
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import (
    MeansResult,
    MeansWork,
    PrivateFitWork,
    PublicResult,
    PublicWork,
    RoundPlan,
    RoundReport,
)
from fedbpt.protocol.specs import Array, Template
from fedbpt.runs.events import RoundPurpose

NOISE_BOUND: Final = 40.0
"""Standard deviations that no noise exceeds."""


class _Reads(WorkKind):  # type: ignore[type-arg]  # of one of these works
    def max_evaluations(self, plan: RoundPlan, work: PrivateFitWork) -> int:  # noqa: ARG002
        return work.reading.n_views

    def max_texts(self, plan: RoundPlan, work: PrivateFitWork, n_texts: int) -> int:  # noqa: ARG002
        n_read = work.n_texts if isinstance(work, PublicWork) else n_texts
        return work.reading.n_views * n_read

    def templates(self, plan: RoundPlan, work: PrivateFitWork) -> tuple[Template, ...]:
        return (plan.template, *work.reading.templates)

    def purpose(self, result: PublicResult | MeansResult) -> RoundPurpose:
        return result.purpose

    def mean_loss(self, result: PublicResult | MeansResult, n_texts: int) -> float:  # noqa: ARG002
        """None is told."""
        return 0.0


class PublicTexts(_Reads):
    work = PublicWork
    result = PublicResult

    def check_result(
        self,
        report: RoundReport,  # noqa: ARG002
        result: PublicResult,
        plan: RoundPlan,
        work: PublicWork,
        n_rows: int | None,  # noqa: ARG002
    ) -> None:
        check_purpose(result.purpose, work.purpose)
        reading = work.reading
        n_embd = max(result.centres.shape[-1:], default=0)
        if not n_embd or reading.n_embd not in (0, n_embd):
            raise WireError(f"centres has shape {list(result.centres.shape)}, expected a state's size", field="centres")
        check_shape(result.centres, (reading.n_readers, n_embd), "centres")
        expected = (reading.n_readers, work.n_texts, n_embd)
        if result.states.shape != expected or len(result.states.data) != result.states.n_bytes:
            raise WireError(f"states has shape {list(result.states.shape)}, expected {list(expected)}", field="states")
        check_shape(result.states.scales, (reading.n_readers, n_embd), "states")
        n_labels = len(plan.labels) if reading.n_word_views else 0
        check_shape(result.words, (work.n_texts, reading.n_word_views, n_labels), "words")
        largest = largest_state(n_embd)
        check_range(result.centres, -largest, largest, "centres")
        check_range(result.states.scales, 0.0, largest, "states")
        check_range(result.words, -MAX_LOSS, ROUNDING, "words")


class PrivateMeans(_Reads):
    work = MeansWork
    result = MeansResult

    def check_result(
        self,
        report: RoundReport,
        result: MeansResult,
        plan: RoundPlan,
        work: MeansWork,
        n_rows: int | None,  # noqa: ARG002
    ) -> None:
        check_purpose(result.purpose, work.purpose)
        n_labels = len(plan.labels)
        check_shape(result.label_sums, (n_labels,), "label_sums")
        check_shape(result.state_sums, (n_labels, work.projection.shape[2]), "state_sums")
        check_shape(result.word_sums, (n_labels,), "word_sums")
        noise = 0.0 if plan.privacy is None else NOISE_BOUND * plan.privacy.noise_of_readout
        most = report.n_texts * (1 + ROUNDING) + noise  # a row adds at most 1
        for field in ("label_sums", "state_sums", "word_sums"):
            check_range(getattr(result, field), -most, most, field)

    def digest(self, work: MeansWork) -> str:
        """Without the projection: another BLAS may compute it with other last bits."""
        none = Array.of(np.zeros(0))
        return codec.digest(msgspec.structs.replace(work, centre=none, projection=none))
