"""Measure a device's model: its speed, and the cost of the task's label words, for ``fedbpt tune --plan``."""

from __future__ import annotations

import time
from typing import Final, NamedTuple

import numpy as np

from fedbpt.engine.scorer import Plan, Scorer
from fedbpt.protocol.codec import digest
from fedbpt.tasks.task import Task, label_word_ids
from fedbpt.tasks.words import word_costs

TEXT_TOKENS: Final = 128
"""Length of the measured text."""


class Speed(NamedTuple):
    """Forward tokens per second of a text, and of the label words' tokens beyond the first of each word.

    ``word_tokens``: number of those tokens by digest of the template, for templates that work with the model.
    ``word_tokens_per_second``: None if there are none.
    """

    tokens_per_second: float
    word_tokens: dict[str, int]
    word_tokens_per_second: float | None


def measure_speed(scorer: Scorer, task: Task, text: str) -> Speed:
    """Score ``text``, repeated to `TEXT_TOKENS` tokens, and after it the label words of the most expensive template."""
    ids = np.resize(scorer.tokenize(text), TEXT_TOKENS)
    text_rate = _rate(scorer, scorer.compile([ids], ids[:1], keep_kv=False))
    usable = [costs for costs in word_costs(scorer, task) if not costs.problem]
    tokens = {digest(costs.template): costs.extra for costs in usable}
    most_expensive = max(usable, key=lambda costs: costs.extra, default=None)
    if most_expensive is None or not most_expensive.extra:
        return Speed(text_rate, tokens, None)
    words = label_word_ids(scorer, most_expensive.template, task.labels)
    plan = scorer.compile([ids], None, "cue", continuations=[words])  # the text's KV is kept: only the words are timed
    return Speed(text_rate, tokens, _rate(scorer, plan))


def _rate(scorer: Scorer, plan: Plan) -> float:
    """Tokens per second of a second pass over ``plan``, with buffers and caches filled by the first."""
    no_prompt = np.zeros((1, 0, scorer.n_embd), dtype=np.float32)
    plan.score(no_prompt)
    before = plan.n_tokens
    began = time.monotonic()
    plan.score(no_prompt)
    return (plan.n_tokens - before) / max(time.monotonic() - began, 1e-6)
