"""Mini-batches of a device's rows: which are scored together, under which template, with which weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedbpt.engine.scorer import Scorer
from fedbpt.errors import InputError
from fedbpt.objective.objective import Objective
from fedbpt.protocol.rounds import EvaluateRequest, RoundPlan
from fedbpt.protocol.seeding import generator
from fedbpt.protocol.specs import Template
from fedbpt.tasks.rows import Row, batch_indices

_NO_ROWS = np.zeros(0, dtype=np.intp)

_MOST_TOGETHER = 32  # texts whose KV the native scorer caches (``kLatest`` in ``text_kv.cpp``)
_BYTES_TOGETHER = 256 << 20  # of their KV (``kLatestBytes``)
_LONG = 128  # tokens of a long text


def rows_together(scorer: Scorer) -> int:
    """Number of rows to score under all templates before the next rows: as many as the scorer caches the KV of."""
    bytes_per_token = 4 * scorer.n_layer * scorer.n_embd  # K and V in float16; less where heads share them
    return min(max(_BYTES_TOGETHER // (_LONG * bytes_per_token), 4), _MOST_TOGETHER)


def parts_of(rows: NDArray[np.intp], n_templates: int, scorer: Scorer) -> list[NDArray[np.intp]]:
    """Split ``rows`` into parts so small that ``scorer`` still holds their KV for the next template."""
    size = rows_together(scorer) if n_templates > 1 else max(len(rows), 1)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def under(template: Template, like: Objective, rows: Sequence[Row]) -> Objective:
    """Make an `Objective` of ``rows`` under another template, otherwise as ``like``, for a single pass."""
    return Objective(
        like.scorer, template, like.labels, rows, like.spec, like.prompt, keep_kv=False, words=like.word_ids
    )


class PlainLogits:
    """Cached logits of rows under another template, without a prompt.

    ``objective``: made by `under`. Request rows in the same parts each time: the cache's key is the part.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self._cache: dict[bytes, NDArray[np.float32]] = {}

    def of(self, part: NDArray[np.intp], cancelled: Callable[[], bool]) -> NDArray[np.float32]:
        """Logits [n, n_labels + n_words] of a part. Raises as `Objective.logits`."""
        key = part.tobytes()
        if key not in self._cache:
            self._cache[key] = self.objective.logits(self.objective.zero_shot_embeds(), part, cancelled)
        return self._cache[key]


def row_weights(objective: Objective, request: RoundPlan | EvaluateRequest) -> NDArray[np.float64]:
    """Weight [n] of each row's loss, by its label."""
    return weights_by_label(request)[objective.targets] if request.label_weights else np.ones(len(objective))


def weights_by_label(request: RoundPlan | EvaluateRequest) -> NDArray[np.float64]:
    """Weight [n_labels] of the loss of a row with each label."""
    if not request.label_weights:
        return np.ones(len(request.labels))
    if len(request.label_weights) != len(request.labels):
        raise InputError(
            f"label_weights must have one weight for each of the {len(request.labels)} labels, "
            f"got {len(request.label_weights)}",
            field="label_weights",
        )
    return np.array(request.label_weights)


def mini_batch(
    objective: Objective,
    weights: NDArray[np.float64],
    size: int,
    plan: RoundPlan,
    path: tuple[str | int, ...],
    held: NDArray[np.intp] = _NO_ROWS,
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Draw a mini-batch by ``weights`` [n] of all rows; return it and the weights [n] for an unbiased mean loss.

    Rows drawn in proportion to their weight then count equally. So rare labels appear in most mini-batches, instead of
    weighing heavily in a few. The rows ``held``, ascending, are never drawn.
    """
    rows = np.setdiff1d(np.arange(len(objective)), held)
    rng = generator(plan.seed, "batch", *path)
    chosen = rows[batch_indices(len(rows), size, rng, objective.targets[rows], weights[rows])]
    is_all_rows = len(chosen) == len(rows)
    return chosen, weights if is_all_rows else np.full(len(weights), weights[rows].mean())
