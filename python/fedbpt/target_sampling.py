"""`sample_targets`: target texts for texts that have none, sampled from the model and chosen by a metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
import numpy as np

from fedbpt.answering import N_EXAMPLES, answer_texts, fitting_examples, generation_of
from fedbpt.api import named_rows
from fedbpt.argument_types import checked
from fedbpt.engine.text_generator import GREEDY, Sampling, TextModel
from fedbpt.errors import ConfigError, DataError
from fedbpt.machine.interrupts import interruptible
from fedbpt.metrics import COMPARES, NAMED, Metric, filled, metric_named, rewards_of
from fedbpt.protocol.seeding import derive_seed, generator
from fedbpt.quantities import PositiveInt
from fedbpt.tasks import GivenTask, Row, load


@dataclass(frozen=True)
class SampledTargets:
    """What `sample_targets` found.

    Attributes:
        rows: (text, answer) of each text that has an answer that is good enough.
        first: mean value of the metric of the likeliest answers (greedy) to all texts.
        best: mean value of the best sampled answers to all texts.
        n_texts: number of texts.
    """

    rows: tuple[Row, ...] = field(repr=False)
    first: float
    best: float
    n_texts: int


@checked
@interruptible()
def sample_targets(
    scorer: TextModel,
    task: GivenTask,
    texts: Sequence[str],
    examples: Any,
    *,
    metric: str | Metric | None = None,
    n_samples: Annotated[int, msgspec.Meta(ge=1, le=256)] = 8,
    n_examples: PositiveInt = N_EXAMPLES,
    temperature: Annotated[float, msgspec.Meta(gt=0, le=10)] = 0.7,
    least: float = 0.5,
    seed: int = 0,
) -> SampledTargets:
    """Let the model answer ``texts`` several times, after examples, and keep each text's best answer by a metric.

    The rows can be tuned on like any rows of target texts, so a metric that needs no target text tunes a model with a
    handful of written answers. The prompt then needs no examples in the model's context. ::

        found = fedbpt.sample_targets(scorer, "replies.toml", texts, examples, metric="max-words:12")
        fedbpt.tune(scorer, "replies.toml", list(found.rows))

    Args:
        scorer: the model.
        task: a task of target texts, or its name or file; texts are presented by its first template.
        texts: texts without answers.
        examples: rows with answers, in any form that `fedbpt.tune` takes.
        metric: as for `fedbpt.compare_answers`. A text's row is (text, ""): the metric must judge the answer alone.
        n_samples: answers to each text: the likeliest, and samples.
        n_examples: examples before a text; each pass over the texts draws them, and their order, anew.
        temperature: of the samples.
        least: value that an answer must reach to be kept.
        seed: draws examples and samples.

    Raises:
        DataError: no texts or examples, an empty text, no example that fits into the context, or no answer that is good
            enough.
        ConfigError: a metric that compares with target texts; or, as MissingExtraError, as `fedbpt.compare_answers`.
    """
    task = load(task)
    settings = generation_of(task)
    name = settings.metric if metric is None else metric
    if isinstance(name, str) and name.partition(":")[0] in COMPARES:
        alone = ", ".join(sorted(set(NAMED) - COMPARES))
        raise ConfigError(
            f"the metric {name} compares answers with target texts, which these texts do not have: give one that "
            f"judges an answer alone ({alone}, or a function)",
            field="metric",
        )
    measure = metric if callable(metric) else metric_named(metric or settings.metric)
    shown = named_rows("examples", examples, task)
    for name, given in (("texts", texts), ("examples", shown)):
        if not len(given):
            raise DataError(f"there are no {name}: give at least one", field=name)
    for place, text in enumerate(texts):
        if not text.strip():
            raise DataError(f"text {place} is empty: leave it out", field="texts")
    rows: list[Row] = [(task.clip(text), "") for text in texts]
    best: list[tuple[bool, float, str]] = [(False, -math.inf, "")] * len(rows)
    first = 0.0
    template = task.templates[0]
    for number in range(n_samples):
        order = generator(seed, "sample-examples", number).permutation(len(shown))[:n_examples]
        context = fitting_examples(scorer, task, template, [shown[i] for i in order])
        if not context:
            raise DataError("no example fits into the model's context: give shorter ones", field="examples")
        how = GREEDY if number == 0 else Sampling(temperature, seed=derive_seed(seed, "sample", number))
        found = answer_texts(scorer, task, rows, None, template, context, how)
        values = rewards_of(measure, rows, found).values
        first = float(filled(values).mean()) if number == 0 else first
        new = [
            (_is_whole(answer) and math.isfinite(value), float(value), answer)
            for value, answer in zip(values, found, strict=True)
        ]
        best = [max(pair, key=lambda each: each[:2]) for pair in zip(best, new, strict=True)]  # an empty one is none
    kept = tuple(
        (text, answer)
        for (text, _), (usable, value, answer) in zip(rows, best, strict=True)
        if usable and value >= least
    )
    if not kept:
        raise DataError(
            f"no answer is worth {least:g} or more by the metric: give better examples or more samples, or lower least",
            field="least",
        )
    mean = float(filled(np.array([value if math.isfinite(value) else math.nan for _, value, _ in best])).mean())
    return SampledTargets(kept, first, mean, len(rows))


def _is_whole(answer: str) -> bool:
    """Whether there is an answer, which does not end within a character."""
    return bool(answer) and not answer.endswith("\ufffd")
