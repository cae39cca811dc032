"""The cost of label words with a model: words of several tokens are computed again for each text and candidate."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from fedbpt.argument_types import checked
from fedbpt.errors import TaskError
from fedbpt.protocol.specs import Template
from fedbpt.tasks.task import Task, Tokenizer, label_word_ids

MAX_LISTED = 6
"""Maximum number of label words in one note."""


class WordCosts(NamedTuple):
    """Token counts of a template's label words.

    ``tokens``: one count per label, in order; empty if the model cannot use the template.
    ``problem``: why it cannot; empty if it can.
    """

    template: Template
    tokens: tuple[int, ...]
    problem: str = ""

    @property
    def extra(self) -> int:
        """Tokens per text and candidate beyond those of a template whose words are single tokens."""
        return sum(count - 1 for count in self.tokens)


@checked
def word_costs(tokenizer: Tokenizer, task: Task) -> list[WordCosts]:
    """Count the tokens of the label words of each of the task's templates, in order."""
    return [_costs(tokenizer, template, task.labels) for template in task.templates]


@checked
def word_notes(tokenizer: Tokenizer, task: Task) -> list[str]:
    """Describe, in a line each, the templates with label words of several tokens and those this model cannot use."""
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
                f"template {pattern}: these label words cost {1 + costs.extra} tokens per text and candidate instead "
                f"of 1: {', '.join(long[:MAX_LISTED])}{more}"
            )
    return notes


def _costs(tokenizer: Tokenizer, template: Template, labels: tuple[str, ...]) -> WordCosts:
    try:
        return WordCosts(template, tuple(len(ids) for ids in label_word_ids(tokenizer, template, labels)))
    except TaskError as error:
        return WordCosts(template, (), str(error))


def _described(tokenizer: Tokenizer, template: Template, word: str, count: int) -> str:
    """Describe a word by its token count and, if there is one, a spelling with fewer tokens."""
    best = word
    fewest = count
    for spelling in (f" {word.strip()}", word.strip()):
        costs = _costs(tokenizer, msgspec.structs.replace(template, label_words=(spelling,)), ("",))
        if not costs.problem and costs.tokens[0] < fewest:
            best = spelling
            fewest = costs.tokens[0]
    return f"{word!r} is {count} tokens" + ("" if best == word else f" ({best!r} is {fewest})")
