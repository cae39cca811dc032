"""`with_examples`: a task with templates that show some rows with their answers."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET

from fedbpt.argument_types import checked
from fedbpt.errors import DataError
from fedbpt.protocol.specs import Template
from fedbpt.tasks.readers import to_rows
from fedbpt.tasks.rows import Row
from fedbpt.tasks.task import Task

_SLOT = "{text}"
_BETWEEN = "\n\n"


@checked
def with_examples(task: Task, rows: Any) -> Task:
    """``task`` with another template for each of its own, after them: the same, preceded by ``rows`` and their answers.

    A run then selects the best of all: of target texts with a metric of generated answers by the metric, else by the
    loss. The rows become part of the task, which travels with the run and the prompt: choose rows that everybody may
    see, and leave them out of the training rows, which would else be scored with their own answers before them. If none
    of the task's stop strings ends an answer before an empty line, after which the model would go on with examples of
    its own, the empty line is added to them.

    Args:
        task: of labels or of target texts.
        rows: three or four rows in any form that `fedbpt.tasks.to_rows` takes.

    Raises:
        DataError: as `to_rows`; a row that contains ``{text}``.
    """
    found = to_rows(rows, task)
    if any(_SLOT in text or _SLOT in str(answer) for text, answer in found):
        raise DataError(f"a row contains {_SLOT}: leave it out", field="rows")
    shown = [_showing(template, found) for template in task.templates]
    generation = task.generation
    if generation is not UNSET and not any(each and each in _BETWEEN for each in generation.stop):
        generation = msgspec.structs.replace(generation, stop=(*generation.stop, _BETWEEN))
    return msgspec.structs.replace(task, templates=(*task.templates, *shown), generation=generation)


def _showing(template: Template, rows: list[Row]) -> Template:
    examples = [
        template.pattern.replace(_SLOT, text)
        + (f" {answer.strip()}" if isinstance(answer, str) else template.label_words[answer])
        for text, answer in rows
    ]
    return msgspec.structs.replace(template, pattern=_BETWEEN.join([*examples, template.pattern]))
