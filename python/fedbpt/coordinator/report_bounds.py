"""How large an honest device's answer can be. What exceeds it is a lie or a fault, and refused
(`fedbpt.coordinator.report_checks`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedbpt.objective.losses import MAX_RATIO
from fedbpt.protocol.rounds import EvaluateRequest, FitWork, LocalWork, PooledWork, ReplayWork, RoundPlan, SelectWork
from fedbpt.protocol.specs import Array, Readout, Template

MAX_LOSS: Final = 1e4
"""Nats (or hinge units) of a row before its weight: logits that give more are of no model."""

MAX_LOGIT: Final = 1e4
"""Of a word, without a readout."""

ROUNDING: Final = 1e-3
"""Nats that a loss of 0 may lie below it in single precision, and what half precision rounds away of a number."""


def most_rows(plan: RoundPlan, n_rows: int) -> int:
    """Rows behind a result, of a device that has ``n_rows``."""
    asked = plan.work.max_rows if isinstance(plan.work, SelectWork | FitWork) and plan.privacy is None else 0
    return min(asked or n_rows, n_rows)


def most_evaluations(plan: RoundPlan) -> int:
    """Candidates that a device scores."""
    work = plan.work
    if isinstance(work, SelectWork):
        return len(work.templates) * max(1, len(plan.labels))
    if isinstance(work, FitWork):
        return 1 + len(work.others)
    if isinstance(work, LocalWork):
        return work.popsize * work.iterations + 1
    return work.popsize if isinstance(work, PooledWork) else work.history.popsize


def most_tokens(plan: RoundPlan, n_texts: int) -> int:
    """Forward tokens of a result that ``n_texts`` rows are behind. No token is shorter than half a byte of its text."""
    work = plan.work
    batch = min(plan.texts or n_texts, n_texts)
    if isinstance(work, SelectWork):
        scored = len(work.templates) * n_texts
    elif isinstance(work, FitWork):
        scored = (1 + len(work.others)) * n_texts
    elif isinstance(work, LocalWork):
        scored = work.popsize * work.iterations * batch + n_texts
    else:
        scored = most_evaluations(plan) * batch
    passes = 2 if plan.objective.perturb and isinstance(work, PooledWork | LocalWork | ReplayWork) else 1
    return passes * scored * _tokens_of_a_text(plan)


def _tokens_of_a_text(plan: RoundPlan) -> int:
    """Under one candidate, with every label's word."""
    templates: tuple[Template, ...] = (plan.template,)
    if isinstance(plan.work, SelectWork):
        templates = plan.work.templates
    elif isinstance(plan.work, FitWork):
        templates = (plan.template, *plan.work.others)
    around = max(2 * len(template.pattern.encode()) for template in templates)
    word = max((2 * len(word.encode()) for template in templates for word in template.label_words), default=0)
    text = plan.objective.max_text_tokens
    answer = word if plan.labels else text  # a target text is cut alike
    marks = 16  # what a tokenizer puts before and after
    return max(len(plan.labels), 1) * (text + around + plan.prompt.n_prompt + answer + marks)


def loss_range(plan: RoundPlan) -> tuple[float, float]:
    """Of a row's mean loss: nats, hinge units, or a perturbed ratio."""
    work = plan.work
    if plan.objective.perturb and isinstance(work, PooledWork | LocalWork | ReplayWork):
        return 0.0, MAX_RATIO
    readouts = [work.readout] if isinstance(work, FitWork) else []
    bias = Readout(weights=Array.of(np.array([plan.label_bias]))) if plan.label_bias else None
    most = _largest_loss(len(plan.labels), plan.label_weights, [*readouts, bias])
    return -ROUNDING if plan.privacy is None else -most, most


def evaluation_loss_range(request: EvaluateRequest) -> tuple[float, float]:
    """`loss_range` of held-back rows."""
    return -ROUNDING, _largest_loss(len(request.labels), request.label_weights, request.readouts)


def _largest_loss(n_labels: int, label_weights: tuple[float, ...], readouts: Iterable[Readout | None]) -> float:
    """A readout moves two labels' logits apart by twice what it adds to one at most; hinge sums over labels."""
    added = max((_added(readout) for readout in readouts if readout is not None), default=0.0)
    return max(label_weights, default=1.0) * (MAX_LOSS + 2 * max(n_labels - 1, 1) * added)


def _added(readout: Readout) -> float:
    """What ``readout`` adds to a label's logit at most."""
    columns = [np.abs(weights.numpy()) for weights in (readout.weights, *readout.others)]
    return max(float((column[0] + MAX_LOGIT * column[1:].sum(axis=0)).max()) for column in columns)


def means_bound(plan: RoundPlan, work: FitWork) -> NDArray[np.float64]:
    """Of the absolute values of `FitResult.means`, in a shape that broadcasts to theirs.

    A row's gradient by a label's logit is a difference of probabilities; by V it is that times (1, x less its centre).
    """
    if work.readout is None:
        logits = np.full(1 + work.n_words, MAX_LOGIT)
        logits[-1] = work.n_words * MAX_LOGIT**2
        return logits
    centre = 0.0 if work.centre is None else float(np.abs(work.centre.numpy()).max(initial=0.0))
    bound = np.full((1 + work.n_words, 1), MAX_LOGIT + centre)
    bound[0] = 1.0
    return bound * max(plan.label_weights, default=1.0) * (1 + ROUNDING)
