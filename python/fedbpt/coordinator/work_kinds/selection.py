"""The selection of the template: `SelectWork` and `SelectResult`."""

from __future__ import annotations

import msgspec
from msgspec import UNSET

from fedbpt.coordinator.reports.report_bounds import max_tokens_of_a_text
from fedbpt.coordinator.work_kinds.base import WorkKind, check_losses, check_shape
from fedbpt.errors import WireError
from fedbpt.objective.answers import ANSWERED_ROWS
from fedbpt.protocol.rounds import RoundPlan, RoundReport, SelectResult, SelectWork
from fedbpt.protocol.specs import Array, Template
from fedbpt.runs.events import RoundPurpose

_MAX_SIZE = 1e6  # of a shift; hidden states of real models reach some thousands


class Selection(WorkKind[SelectWork, SelectResult]):
    work = SelectWork
    result = SelectResult

    def check_result(
        self, report: RoundReport, result: SelectResult, plan: RoundPlan, work: SelectWork, n_rows: int | None
    ) -> None:
        n_templates = len(work.templates)
        n_labels = len(plan.labels) if work.by_label else 0
        check_shape(result.loss_sums, (n_templates, n_labels) if n_labels else (n_templates,), "loss_sums")
        _check_correct(result, plan, report.n_texts)
        _check_sizes(result, plan, n_templates)
        _check_rewards(result, plan, n_templates, report.n_texts)
        counts = result.label_counts
        fewest, most = (report.n_texts, n_rows or sum(counts)) if n_labels else (0, 0)
        fewest -= 0 if report.devices is UNSET else n_labels  # counts of a sum are rounded
        if len(counts) != n_labels or not fewest <= sum(counts) <= most:
            raise WireError(
                f"label_counts has {len(counts)} labels and {sum(counts)} rows, expected {n_labels} labels and"
                f" {fewest} to {most} rows",
                field="label_counts",
            )
        likelihood = msgspec.structs.replace(plan.objective, generation=UNSET)
        allowed = self.loss_range(msgspec.structs.replace(plan, objective=likelihood), work)
        check_losses(result.loss_sums.numpy() / report.n_texts, allowed, "loss_sums")

    def max_evaluations(self, plan: RoundPlan, work: SelectWork) -> int:
        return len(work.templates) * max(1, len(plan.labels))

    def max_texts(self, plan: RoundPlan, work: SelectWork, n_texts: int) -> int:  # noqa: ARG002
        return len(work.templates) * n_texts

    def max_tokens(self, plan: RoundPlan, work: SelectWork, n_texts: int) -> int:
        a_text = max_tokens_of_a_text(plan, work.templates)
        sized = len(work.templates) * n_texts if plan.prompt.shifts else 0  # texts whose states give the shifts' size
        return super().max_tokens(plan, work, n_texts) + sized * a_text

    def max_rows(self, work: SelectWork) -> int:
        return work.max_rows

    def templates(self, plan: RoundPlan, work: SelectWork) -> tuple[Template, ...]:  # noqa: ARG002
        return work.templates

    def mean_loss(self, result: SelectResult, n_texts: int) -> float:
        """Of the best template."""
        sums = result.loss_sums.numpy()
        return float(sums.reshape(sums.shape[0], -1).sum(axis=1).min()) / n_texts

    def purpose(self, result: SelectResult) -> RoundPurpose:  # noqa: ARG002
        return "selection"

    def scaled(self, result: SelectResult, share: float) -> SelectResult:
        return msgspec.structs.replace(result, loss_sums=Array.of(result.loss_sums.numpy() * share))


def _check_sizes(result: SelectResult, plan: RoundPlan, n_templates: int) -> None:
    if (result.sizes is not UNSET) != plan.prompt.shifts:
        raise WireError("sizes must be given where the prompt shifts, and only there", field="sizes")
    if result.sizes is not UNSET:
        sizes = result.sizes.numpy()
        if sizes.ndim != 2 or len(sizes) != n_templates or not ((sizes > 0) & (sizes < _MAX_SIZE)).all():
            raise WireError(
                f"sizes must be of shape [{n_templates}, n_layer], positive and below {_MAX_SIZE:.0e}, got shape"
                f" {list(sizes.shape)}",
                field="sizes",
            )


def _check_rewards(result: SelectResult, plan: RoundPlan, n_templates: int, n_texts: int) -> None:
    """A device that cannot measure answers gives no rewards."""
    rewards, n_answered = result.reward_sums, result.n_answered
    if rewards is UNSET and n_answered is UNSET:
        return
    most = min(n_texts, ANSWERED_ROWS)
    if rewards is UNSET or n_answered is UNSET or plan.objective.generation is UNSET or n_answered > most:
        raise WireError(
            f"reward_sums and n_answered, at most {most}, must be given together, where the plan asks for answers",
            field="reward_sums",
        )
    check_shape(rewards, (n_templates,), "reward_sums")
    check_losses(rewards.numpy() / n_answered, (0.0, 1.0), "reward_sums")


def _check_correct(result: SelectResult, plan: RoundPlan, n_texts: int) -> None:
    """Only tasks with labels have counts, and no private run: they would undo its noise."""
    has_counts = bool(plan.labels) and plan.privacy is None
    if result.correct and not (has_counts and len(result.correct) == result.loss_sums.shape[0]):
        expected = f"0 or {result.loss_sums.shape[0]}" if has_counts else "0"
        raise WireError(f"correct has {len(result.correct)} entries, expected {expected}", field="correct")
    if max(result.correct, default=0) > n_texts:
        raise WireError(
            f"correct has {max(result.correct)} of {n_texts} texts, expected at most {n_texts}", field="correct"
        )
