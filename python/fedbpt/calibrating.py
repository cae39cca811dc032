"""`calibrate`: label words corrected from texts alone, where there are no labels to tune on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedbpt.argument_types import checked
from fedbpt.engine.scorer import Scorer
from fedbpt.errors import DataError, TaskError
from fedbpt.machine.interrupts import interruptible
from fedbpt.objective.losses import log_probabilities
from fedbpt.objective.objective import Objective
from fedbpt.prompts.prompt import Prompt
from fedbpt.protocol.specs import Array, ObjectiveSpec, PromptSpec, Readout
from fedbpt.tasks import GivenTask, Row, load


@checked
@interruptible()
def calibrate(scorer: Scorer, task: GivenTask, texts: Sequence[str]) -> Prompt:
    """Correct the model's preference for some label words, from texts without labels. Nothing is tuned.

    Each label word's mean log-probability over the texts is subtracted from it, under each of the task's templates, and
    the templates' log-probabilities are averaged. This assumes that all labels are about as frequent in ``texts``. With
    a few labelled rows, `fedbpt.tune` does better. ::

        prompt = fedbpt.calibrate(scorer, "support.toml", texts)
        fedbpt.evaluate(scorer, "support.toml", test, prompt).accuracy

    Args:
        scorer: the model.
        task: a task with labels, or its name or file.
        texts: some 50 or more, as the task's rows have them.

    Raises:
        DataError: no texts, or an empty one.
        TaskError: a task of target texts, or a template that does not fit the model.
    """
    task = load(task)
    if not task.labels:
        raise TaskError(f"task {task.name} has no labels to calibrate: use fedbpt.tune", field="task")
    if not len(texts):
        raise DataError("there are no texts: give at least one", field="texts")
    for place, text in enumerate(texts):
        if not text.strip():
            raise DataError(f"text {place} is empty: leave it out", field="texts")
    rows: list[Row] = [(task.clip(text), 0) for text in texts]  # any label will do: it is not used
    spec = ObjectiveSpec(max_text_tokens=task.max_text_tokens, readout_words=0)
    views = [
        Objective(scorer, template, task.labels, rows, spec, PromptSpec(d=1), keep_kv=False)
        for template in task.templates
    ]
    every = np.arange(len(rows))
    scores = [view.logits(view.zero_shot_embeds(), every).astype(np.float64) for view in views]
    bias = [Array.of(-log_probabilities(of_view).mean(axis=0, keepdims=True)) for of_view in scores]
    views[0].readout = Readout(weights=bias[0], others=tuple(bias[1:]))
    history = {"calibrated_on_texts": len(texts)}
    return views[0].as_prompt(np.zeros(1), task, (history,), others=task.templates[1:])
