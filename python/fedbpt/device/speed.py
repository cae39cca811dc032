"""How fast a device's model is, and what the label words of its task cost it: what `fedbpt tune --plan` asks for."""

from __future__ import annotations

import time
from typing import Final, NamedTuple

import numpy as np

from fedbpt.engine.scorer import Plan, Scorer
from fedbpt.protocol.codec import digest
from fedbpt.tasks.task import Task, label_word_ids
from fedbpt.tasks.words import word_costs

TEXT_TOKENS: Final = 128
"""Length of the text that is measured on."""


class Speed(NamedTuple):
    """Forward tokens per second of a text, and of what label words cost beyond one token each.

    ``word_tokens``: those tokens, by the template's digest, of the templates that can serve the model.
    ``word_tokens_per_second`` None: there are none.
    """

    tokens_per_second: float
    word_tokens: dict[str, int]
    word_tokens_per_second: float | None


def measure_speed(scorer: Scorer, task: Task, text: str) -> Speed:
    """Score ``text``, repeated to `TEXT_TOKENS` tokens, and the dearest of the task's label words after it."""
    ids = np.resize(scorer.tokenize(text), TEXT_TOKENS)
    alone = _rate(scorer, scorer.compile([ids], ids[:1], keep_kv=False))
    usable = [costs for costs in word_costs(scorer, task) if not costs.problem]
    tokens = {digest(costs.template): costs.extra for costs in usable}
    dearest = max(usable, key=lambda costs: costs.extra, default=None)
    if dearest is None or not dearest.extra:
        return Speed(alone, tokens, None)
    words = label_word_ids(scorer, dearest.template, task.labels)
    plan = scorer.compile([ids], None, "cue", continuations=[words])  # its KV is kept: what is timed are the words
    return Speed(alone, tokens, _rate(scorer, plan))


def _rate(scorer: Scorer, plan: Plan) -> float:
    """Tokens per second of a second pass over ``plan``, when buffers and caches are there."""
    none = np.zeros((1, 0, scorer.n_embd), dtype=np.float32)
    plan.score(none)
    before, began = plan.n_tokens, time.monotonic()
    plan.score(none)
    return (plan.n_tokens - before) / max(time.monotonic() - began, 1e-6)
