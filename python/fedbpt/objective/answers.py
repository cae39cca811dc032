"""`AnswerObjective`: what the model's own answers to texts are worth by a metric, under candidate prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedbpt.engine.scorer import Scorer
from fedbpt.engine.text_generator import GREEDY, GeneratingPlan, generates
from fedbpt.errors import InputError, ScoringInterrupted
from fedbpt.metrics import Metric, rewards_of
from fedbpt.protocol.specs import Generation, PromptSpec, Template
from fedbpt.search.projection import placing
from fedbpt.tasks.rows import Row
from fedbpt.tasks.task import bos_ids, render_ids

ANSWERED_ROWS: Final = 32
"""Most training rows of a device whose answers select the template."""

CHUNK: Final = 32
"""Texts that are answered between two questions whether the work was cancelled."""


class Answered(NamedTuple):
    """Answers of k candidates to n texts.

    ``rewards`` [k, n]: 0 to 1, 0 where the metric failed. ``n_failed`` and ``n_distinct`` [k]: answers that the metric
    failed on, and different answers.
    """

    rewards: NDArray[np.float64]
    n_failed: NDArray[np.intp]
    n_distinct: NDArray[np.intp]


class AnswerObjective:
    """Rows of target texts, encoded once, whose texts are answered greedily.

    Args:
        scorer: a model that generates text.
        template: how a text is presented.
        rows: (text, target text) pairs.
        max_text_tokens: maximum length of a text.
        prompt: placement of the prompt: ``cue``, ``layer`` or ``layers``.
        generation: how an answer ends.
        metric: measures an answer; what it returns outside 0 to 1 counts as the nearer of both.
        keep_kv: False for a single pass over the rows: their KV is not kept.

    Raises:
        InputError: a prompt in front, a text too long for the context, or a model that only scores.
    """

    def __init__(
        self,
        scorer: Scorer,
        template: Template,
        rows: Sequence[Row],
        max_text_tokens: int,
        prompt: PromptSpec,
        generation: Generation,
        metric: Metric,
        keep_kv: bool = True,
    ) -> None:
        self._rows = [(text, str(target)) for text, target in rows]
        self._generation = generation
        self._metric = metric
        self._plan = answering_plan(scorer, template, [text for text, _ in rows], max_text_tokens, prompt, (), keep_kv)

    @property
    def n_tokens(self) -> int:
        """Forward tokens computed so far."""
        return self._plan.n_tokens

    def measure(
        self,
        embeds: ArrayLike,
        indices: ArrayLike | None = None,
        progress: Callable[[int, int], None] = lambda _done, _total: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Answered:
        """The answers to rows ``indices`` [n] (None: all) under candidates [k, n_prompt, n_embd].

        ``progress``: called with (rows done, total rows). Raises `ScoringInterrupted` when ``cancelled`` returns True.
        """
        chosen = np.arange(len(self._rows)) if indices is None else np.asarray(indices, dtype=np.intp)
        rewards = []
        n_failed = np.zeros(len(np.asarray(embeds)), dtype=np.intp)
        distinct: list[set[str]] = [set() for _ in n_failed]
        how = self._generation
        for start in range(0, len(chosen), CHUNK):
            if cancelled():
                raise ScoringInterrupted(f"generating was cancelled after {start} of {len(chosen)} texts")
            part = chosen[start : start + CHUNK]
            found = self._plan.generate(embeds, part, GREEDY, max_tokens=how.max_tokens, stop=how.stop)
            rows = [self._rows[i] for i in part]
            of_part = []
            for number, own in enumerate(found):
                answers = [answer.text.strip() for answer in own]
                values = rewards_of(self._metric, rows, answers).values
                failed = ~((values >= 0.0) & (values <= 1.0))  # NaN, too
                of_part.append(np.where(failed, 0.0, values))
                n_failed[number] += int(failed.sum())
                distinct[number].update(answers)
            rewards.append(np.stack(of_part))
            progress(start + len(part), len(chosen))
        return Answered(np.concatenate(rewards, axis=1), n_failed, np.array([len(each) for each in distinct]))


def answering_plan(
    scorer: Scorer,
    template: Template,
    texts: Sequence[str],
    max_text_tokens: int,
    prompt: PromptSpec,
    before: Sequence[NDArray[np.int32]] = (),
    keep_kv: bool = True,
) -> GeneratingPlan:
    """The texts, laid out to be continued under prompts; ``before``: token ids after BOS and before each text.

    Raises `InputError` as `AnswerObjective`.
    """
    if prompt.in_front:
        raise InputError(
            f"a prompt of placement {prompt.placement!r} cannot generate many answers at a time: tune one with "
            "placement 'layers' or 'cue'",
            field="prompt",
        )
    if not generates(scorer):
        raise InputError(f"model {scorer.name} only scores texts: use one that generates", field="scorer")
    bos = bos_ids(scorer)
    ids = [render_ids(scorer, template, text, max_text_tokens)[len(bos) :] for text in texts]
    prefix = np.concatenate([bos, *before]) if len(bos) or before else None
    return cast(GeneratingPlan, scorer.compile(ids, None, keep_kv=keep_kv, prefix=prefix, **placing(prompt)))
