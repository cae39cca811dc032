"""Which of a device's rows are scored together, under which template, and what each weighs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedbpt.errors import InputError
from fedbpt.objective.objective import Objective
from fedbpt.protocol.rounds import EvaluateRequest, RoundPlan
from fedbpt.protocol.seeding import generator
from fedbpt.protocol.specs import Template
from fedbpt.tasks.rows import Row, batch_indices

TEMPLATES_SHARE = 4
"""Rows that are scored under all templates before the next ones are: texts differ in their ends alone then.

As many as the native scorer holds on to (``kLatest`` in ``text_kv.cpp``).
"""


def parts_of(rows: NDArray[np.intp], n_templates: int) -> list[NDArray[np.intp]]:
    """``rows`` in parts of so few that a scorer still has their KV when they come under the next template."""
    size = TEMPLATES_SHARE if n_templates > 1 else max(len(rows), 1)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def under(template: Template, like: Objective, rows: Sequence[Row]) -> Objective:
    """The ``rows`` of ``like`` under another template, with the same words; for one pass."""
    return Objective(
        like.scorer, template, like.labels, rows, like.spec, like.prompt, keep_kv=False, words=like.word_ids
    )


class PlainLogits:
    """Logits of rows under another template, without a prompt; each part of the rows is computed once.

    ``objective``: made by `under`. Rows are to come in the same parts each time.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self._known: dict[bytes, NDArray[np.float32]] = {}

    def of(self, part: NDArray[np.intp], cancelled: Callable[[], bool]) -> NDArray[np.float32]:
        """Logits [n, n_labels + n_words] of a part. Raises as `Objective.logits`."""
        key = part.tobytes()
        if key not in self._known:
            self._known[key] = self.objective.logits(self.objective.zero_shot_embeds(), part, cancelled)
        return self._known[key]


def row_weights(objective: Objective, asked: RoundPlan | EvaluateRequest) -> NDArray[np.float64]:
    """Weight [n] of each row's loss: its label's."""
    if not asked.label_weights:
        return np.ones(len(objective))
    if len(asked.label_weights) != len(asked.labels):
        raise InputError(f"{len(asked.label_weights)} label weights for {len(asked.labels)} labels: give one each")
    return np.array(asked.label_weights)[objective.targets]


def mini_batch(
    objective: Objective, weights: NDArray[np.float64], size: int, plan: RoundPlan, path: tuple[str | int, ...]
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """A mini-batch by ``weights`` [n] of all rows, and the weights [n] that make its mean loss an unbiased estimate.

    Rows that were drawn by their weight count alike, so that a rare label is in the mini-batch instead of weighing
    much in a few of them.
    """
    chosen = batch_indices(len(objective), size, generator(plan.seed, "batch", *path), objective.targets, weights)
    everything = len(chosen) == len(objective)
    return chosen, weights if everything else np.full(len(weights), weights.mean())
