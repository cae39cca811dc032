"""The built-in tasks: AG News, SST-2 and BBC News, each with candidate templates.

Every label word is a single token, distinct within its template, in the vocabularies of SmolLM2 and Gemma 3. A run
selects the template on training shots, per model (`fedbpt.protocol.rounds.SelectWork`).
"""

from __future__ import annotations

from types import MappingProxyType

from fedbpt.protocol.specs import Template
from fedbpt.tasks.task import Task


def _templates(words: tuple[str, ...], *patterns: str) -> tuple[Template, ...]:
    return tuple(Template(pattern=pattern, label_words=words) for pattern in patterns)


AG_NEWS = Task(
    name="ag-news",
    labels=("World", "Sports", "Business", "Sci/Tech"),
    templates=(
        *_templates(
            (" World", " Sports", " Business", " Technology"),
            "{text}\nTopic:",
            "{text}\nCategory:",
            "{text}\nSection:",
        ),
        *_templates((" politics", " sports", " business", " technology"), "{text}\nThis article is about"),
    ),
)

SST_2 = Task(
    name="sst-2",
    labels=("negative", "positive"),
    templates=(
        *_templates((" negative", " positive"), "{text}\nSentiment:"),
        *_templates((" terrible", " great"), "{text} It was", "{text} The movie was"),
        *_templates((" bad", " good"), "Review: {text}\nRating:"),
    ),
    text_columns=("text", "sentence", "content"),
)

BBC_NEWS = Task(
    name="bbc-news",
    labels=("business", "entertainment", "politics", "sport", "tech"),
    templates=(
        *_templates(
            (" business", " entertainment", " politics", " sports", " technology"),
            "{text}\nCategory:",
            "{text}\nThis article is about",
            "{text}\nTopic:",
        ),
        *_templates((" Business", " Entertainment", " Politics", " Sport", " Technology"), "{text}\nCategory:"),
    ),
    max_words=60,
)

BUILTIN = MappingProxyType({task.name: task for task in (AG_NEWS, SST_2, BBC_NEWS)})
