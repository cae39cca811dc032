"""A task that the toy model can tune on: two labels whose words differ in their first byte, and rows to learn from."""

from __future__ import annotations

from fedbpt.messages import Template
from fedbpt.tasks import Row, Task

TASK = Task(
    name="toy-mood",
    labels=("negative", "positive"),
    templates=(
        Template(pattern="{text}\nMood:", label_words=("bad", "good")),
        Template(pattern="{text}\nIt was:", label_words=("dull", "fine")),
    ),
)

TASK_FILE = """
name = "toy-mood"
labels = ["negative", "positive"]
[[templates]]
pattern = "{text}\\nMood:"
label_words = ["bad", "good"]
[[templates]]
pattern = "{text}\\nIt was:"
label_words = ["dull", "fine"]
"""

_WORDS = ("zzz", "aaa", "iii")


def rows(n: int, first: int = 0) -> list[Row]:
    """``n`` rows, one in four negative: that is there to learn. ``first``: the first one's number."""
    return [(f"{_WORDS[i % 3]} number {i}", int(i % 4 > 0)) for i in range(first, first + n)]
