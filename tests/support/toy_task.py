"""A task that the toy model can be tuned on: two labels whose words are one byte each, and rows."""

from __future__ import annotations

from fedbpt.protocol.specs import Template
from fedbpt.tasks import Row, Task

TASK = Task(
    name="toy-mood",
    labels=("negative", "positive"),
    templates=(
        Template(pattern="{text}\nMood:", label_words=("b", "g")),
        Template(pattern="{text}\nIt was:", label_words=("d", "f")),
    ),
)

TASK_FILE = """
name = "toy-mood"
labels = ["negative", "positive"]
[[templates]]
pattern = "{text}\\nMood:"
label_words = ["b", "g"]
[[templates]]
pattern = "{text}\\nIt was:"
label_words = ["d", "f"]
"""

_WORDS = ("zzz", "aaa", "iii")


def rows(n: int, first: int = 0) -> list[Row]:
    """``n`` rows, one in four negative, which can be learned. ``first``: number of the first row."""
    return [(f"{_WORDS[i % 3]} number {i}", int(i % 4 > 0)) for i in range(first, first + n)]


LONG_WORDS = Task(
    name="toy-long",
    labels=TASK.labels,
    templates=tuple(
        Template(pattern=template.pattern, label_words=("b" * 70, "g" * 70)) for template in TASK.templates
    ),
)
"""A task whose label words are too long to be scored where hidden states can be read instead."""
