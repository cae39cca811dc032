"""`with_examples`: a task with templates that show some rows with their answers."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from msgspec import UNSET

from fedbpt.argument_types import checked
from fedbpt.errors import DataError
from fedbpt.protocol.seeding import generator
from fedbpt.protocol.specs import Template
from fedbpt.quantities import PositiveInt
from fedbpt.tasks.readers import to_rows
from fedbpt.tasks.rows import Row
from fedbpt.tasks.task import Task

_SLOT = "{text}"
_BETWEEN = "\n\n"


@checked
def with_examples(task: Task, rows: Any, *, n: PositiveInt | None = None, sets: PositiveInt = 1, seed: int = 0) -> Task:
    """``task`` with another template for each of its own, after them: the same, preceded by ``rows`` and their answers.

    A run then selects the best of all: of target texts with a metric of generated answers by the metric, else by the
    loss. The rows become part of the task, which travels with the run and the prompt: choose rows that everybody may
    see, and leave them out of the training rows, which would else be scored with their own answers before them. If none
    of the task's stop strings ends an answer before an empty line, after which the model would go on with examples of
    its own, the empty line is added to them.

    Which rows are shown matters as much as that some are: with ``sets``, each template is followed by so many, of
    different rows. Eight sets of three out of a dozen rows are a good start. ::

        task = with_examples(task, rows[:12], n=3, sets=8)

    Args:
        task: of labels or of target texts.
        rows: in any form that `fedbpt.tasks.to_rows` takes; for one set three or four.
        n: rows of a set; None: all.
        sets: number of sets: the first ``n`` rows, and others that are drawn at random.
        seed: draws them.

    Raises:
        DataError: as `to_rows`; a row that contains ``{text}``; fewer than ``n`` rows, or too few for ``sets``.
    """
    found = to_rows(rows, task)
    if any(_SLOT in text or _SLOT in str(answer) for text, answer in found):
        raise DataError(f"a row contains {_SLOT}: leave it out", field="rows")
    drawn = _sets(len(found), n or len(found), sets, seed)
    shown = [_showing(template, [found[i] for i in each]) for template in task.templates for each in drawn]
    generation = task.generation
    if generation is not UNSET and not any(each and each in _BETWEEN for each in generation.stop):
        generation = msgspec.structs.replace(generation, stop=(*generation.stop, _BETWEEN))
    return msgspec.structs.replace(task, templates=(*task.templates, *shown), generation=generation)


def _sets(n_rows: int, n: int, sets: int, seed: int) -> list[tuple[int, ...]]:
    """Indices of the rows of each set, in the order in which they are shown."""
    if n > n_rows or sets > math.perm(n_rows, n):
        raise DataError(f"{n_rows} rows are too few for {sets} sets of n = {n}: give more rows", field="n")
    rng = generator(seed, "examples-shown")
    found = [tuple(range(n))]
    while len(found) < sets:
        each = tuple(rng.permutation(n_rows)[:n].tolist())
        if each not in found:
            found.append(each)
    return found


def _showing(template: Template, rows: list[Row]) -> Template:
    examples = [
        template.pattern.replace(_SLOT, text)
        + (f" {answer.strip()}" if isinstance(answer, str) else template.label_words[answer])
        for text, answer in rows
    ]
    return msgspec.structs.replace(template, pattern=_BETWEEN.join([*examples, template.pattern]))
