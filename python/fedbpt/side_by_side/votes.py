"""`Votes`: a file of rows that a person chose, on this machine."""

from __future__ import annotations

import json
from pathlib import Path

from fedbpt.errors import ConfigError, DataError
from fedbpt.tasks import Task

SUFFIXES = (".jsonl", ".ndjson")


class Votes:
    """A JSON Lines file to which each vote adds a row: a text, and the answer or label that was chosen for it.

    Args:
        path: the file; it is created, with its folders, by the first vote.
        task: the rows' task, whose columns they have; None: ``text`` and ``label``.

    Raises:
        ConfigError: another kind of file, or a task whose texts are made of several columns.
    """

    def __init__(self, path: Path, task: Task | None) -> None:
        if path.suffix not in SUFFIXES:
            raise ConfigError(
                f"--votes {path}: name a .jsonl file, which `fedbpt device --data` reads", field="--votes"
            )
        self.columns = ("text", "label") if task is None else (task.text_columns[0], task.label_column)
        if "{" in self.columns[0]:
            raise ConfigError("--votes keeps texts of one column: use a task that reads one", field="--votes")
        self.path = path

    def add(self, text: str, answer: str) -> None:
        """Add a row. Raises `DataError` if the file cannot be written."""
        row = dict(zip(self.columns, (text, answer), strict=True))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise DataError(f"cannot write {self.path}: {error.strerror or error}", field="--votes") from error
