"""Tasks and their data.

>>> from fedbpt import tasks
>>> tasks.load("ag-news").labels
('World', 'Sports', 'Business', 'Sci/Tech')
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

from fedbpt.argument_types import checked
from fedbpt.errors import ConfigError
from fedbpt.protocol.specs import Generation, Template
from fedbpt.tasks.builtin import BUILTIN
from fedbpt.tasks.draft import Draft, draft_task, task_toml
from fedbpt.tasks.examples import with_examples
from fedbpt.tasks.partition import Manifest, partition, read_manifest, split_rows, write_partition
from fedbpt.tasks.perturb import perturb
from fedbpt.tasks.readers import (
    drop_duplicates,
    read_rows,
    read_task_rows,
    rows_from_dataset,
    to_rows,
    write_rows,
)
from fedbpt.tasks.rows import Row
from fedbpt.tasks.sources import bbc_news, load_hub
from fedbpt.tasks.task import Task, Tokenizer, cue_ids, label_word_ids, load_task, render_ids
from fedbpt.tasks.words import WordCosts, word_costs, word_notes

__all__ = [
    "BUILTIN",
    "Draft",
    "Generation",
    "GivenTask",
    "Manifest",
    "Row",
    "Task",
    "Template",
    "Tokenizer",
    "WordCosts",
    "bbc_news",
    "cue_ids",
    "draft_task",
    "drop_duplicates",
    "label_word_ids",
    "load",
    "load_hub",
    "load_task",
    "partition",
    "perturb",
    "read_manifest",
    "read_rows",
    "read_task_rows",
    "render_ids",
    "rows_from_dataset",
    "split_rows",
    "task_toml",
    "to_rows",
    "with_examples",
    "word_costs",
    "word_notes",
    "write_partition",
    "write_rows",
]


GivenTask: TypeAlias = Task | str | os.PathLike[str]
"""A task, the name of a built-in one, or the path of a task file."""


@checked
def load(name_or_path: GivenTask) -> Task:
    """Load a built-in task by name (``ag-news``, ``sst-2``, ``bbc-news``) or a task file; a `Task` is returned as is.

    Raises:
        ConfigError: neither a built-in task nor a readable task file.
        TaskError: a task file whose templates cannot work.
    """
    if isinstance(name_or_path, Task):
        return name_or_path
    task = BUILTIN.get(str(name_or_path))
    if task is not None:
        return task
    path = Path(name_or_path)
    if path.suffix not in (".toml", ".json") and not path.is_file():
        raise ConfigError(f"unknown task {str(name_or_path)[:60]!r}: give a task file or one of {', '.join(BUILTIN)}")
    return load_task(path)
