"""How large the numbers of an honest device can be, whatever its work (`fedbpt.coordinator.work_kinds`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from msgspec import UNSET

from fedbpt.objective.losses import MAX_RATIO
from fedbpt.objective.objective import TIE
from fedbpt.protocol.rounds import EvaluateRequest, RoundPlan
from fedbpt.protocol.specs import Array, LayerReadout, Readout, Template

MAX_LOSS: Final = 1e4
"""Largest loss of a row before its weight, nats or hinge units: no model has logits that give more."""

MAX_LOGIT: Final = 1e4
"""Largest logit of a word, without a readout."""

ROUNDING: Final = 1e-3
"""Rounding error: nats that a loss of 0 may lie below it in single precision; relative, of half precision."""

RATIO_RANGE: Final = (0.0, MAX_RATIO)
"""Of the perturbed ratio."""


def max_tokens_of_a_text(plan: RoundPlan, templates: Sequence[Template]) -> int:
    """Most forward tokens of a text under one candidate, with every label's word.

    A token stands for at least half a byte of its text.
    """
    around = max(2 * len(template.pattern.encode()) for template in templates)
    word = max((2 * len(word.encode()) for template in templates for word in template.label_words), default=0)
    text = plan.objective.max_text_tokens
    target = word if plan.labels else text  # a target text is cut to the same length
    special = 16  # tokens that a tokenizer adds before and after
    generation = plan.objective.generation
    answer = text + around + special + plan.prompt.n_prompt + generation.max_tokens if generation else 0
    return max(len(plan.labels), 1) * (text + around + plan.prompt.n_prompt + target + special) + answer


def plan_loss_range(plan: RoundPlan, readout: Readout | None) -> tuple[float, float]:
    """Smallest and largest mean loss of a row, nats or hinge units, with ``readout`` or the plan's bias."""
    if plan.objective.generation is not UNSET:
        return 0.0, 1.0 + TIE
    bias = Readout(weights=Array.of(np.array([plan.label_bias]))) if plan.label_bias else None
    most = _largest_loss(len(plan.labels), plan.label_weights, [readout, bias])
    return -ROUNDING if plan.privacy is None else -most, most


def evaluation_loss_range(request: EvaluateRequest) -> tuple[float, float]:
    """`plan_loss_range` of held-back rows."""
    if request.generation is not UNSET:
        return 0.0, 1.0
    n_labels, weights = len(request.labels), request.label_weights
    by_layers = [_largest_logit(readout) for readout in request.layer_readouts if readout is not None]
    of_layers = max(weights, default=1.0) * (2 * max(by_layers, default=0.0) + math.log(max(n_labels, 1)) + ROUNDING)
    return -ROUNDING, max(_largest_loss(n_labels, weights, request.readouts), of_layers)


def _largest_loss(n_labels: int, label_weights: tuple[float, ...], readouts: Iterable[Readout | None]) -> float:
    """A readout moves two labels' logits apart by at most twice what it adds to one; hinge sums over labels."""
    added = max((_added(readout) for readout in readouts if readout is not None), default=0.0)
    return max(label_weights, default=1.0) * (MAX_LOSS + 2 * max(n_labels - 1, 1) * added)


def _added(readout: Readout) -> float:
    """The most that ``readout`` adds to a label's logit."""
    columns = [np.abs(weights.numpy()) for weights in (readout.weights, *readout.others)]
    return max(float((column[0] + MAX_LOGIT * column[1:].sum(axis=0)).max()) for column in columns)


def _largest_logit(readout: LayerReadout) -> float:
    """The largest logit that ``readout`` gives: a state has norm √n_embd, a label word's log-probability a bound."""
    weights = readout.weights.numpy()
    of_states = math.sqrt(weights.shape[2]) * np.sqrt((weights**2).sum(axis=2)).sum(axis=(0, 1)).max(initial=0.0)
    of_words = MAX_LOSS * float(np.abs(readout.word_scales.numpy()).sum())
    return float(of_states + of_words + np.abs(readout.bias.numpy()).max(initial=0.0))
