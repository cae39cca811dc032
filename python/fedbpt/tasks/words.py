"""What label words cost with a model: those of several tokens are computed anew for each text and candidate."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from fedbpt.argument_types import checked
from fedbpt.errors import TaskError
from fedbpt.protocol.specs import Template
from fedbpt.tasks.task import Task, Tokenizer, label_word_ids

MAX_LISTED = 6
"""Words that a line names at most."""


class WordCosts(NamedTuple):
    """Tokens of a template's label words. ``tokens``: of each, in label order; none where the template cannot serve.

    ``problem``: why it cannot; empty: it can.
    """

    template: Template
    tokens: tuple[int, ...]
    problem: str = ""

    @property
    def extra(self) -> int:
        """Tokens that a candidate costs for each text, beyond those where every word is one token."""
        return sum(count - 1 for count in self.tokens)


@checked
def word_costs(tokenizer: Tokenizer, task: Task) -> list[WordCosts]:
    """The costs of each of the task's templates, in order."""
    return [_costs(tokenizer, template, task.labels) for template in task.templates]


@checked
def word_notes(tokenizer: Tokenizer, task: Task) -> list[str]:
    """A line for each template whose label words cost more than they must, or that cannot serve this model."""
    notes = []
    for costs in word_costs(tokenizer, task):
        pattern = repr(costs.template.pattern)
        if costs.problem:
            notes.append(f"template {pattern} cannot be used with this model: {costs.problem}")
        elif costs.extra:
            words = zip(costs.template.label_words, costs.tokens, strict=True)
            long = [_described(tokenizer, costs.template, word, count) for word, count in words if count > 1]
            more = f" and {len(long) - MAX_LISTED} more" if len(long) > MAX_LISTED else ""
            notes.append(
                f"template {pattern}: with these label words a candidate costs {1 + costs.extra} tokens a text instead "
                f"of 1: {', '.join(long[:MAX_LISTED])}{more}"
            )
    return notes


def _costs(tokenizer: Tokenizer, template: Template, labels: tuple[str, ...]) -> WordCosts:
    try:
        return WordCosts(template, tuple(len(ids) for ids in label_word_ids(tokenizer, template, labels)))
    except TaskError as error:
        return WordCosts(template, (), str(error))


def _described(tokenizer: Tokenizer, template: Template, word: str, count: int) -> str:
    """A word with its tokens, and how the same word is written with fewer."""
    best, fewest = word, count
    for spelling in (f" {word.strip()}", word.strip()):
        alone = _costs(tokenizer, msgspec.structs.replace(template, label_words=(spelling,)), ("",))
        if not alone.problem and alone.tokens[0] < fewest:
            best, fewest = spelling, alone.tokens[0]
    return f"{word!r} is {count} tokens" + ("" if best == word else f" ({best!r} is {fewest})")
