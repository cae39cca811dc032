"""`Votes`: a file of rows that a person chose, on this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

from fedbpt.checking import utf8
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
        """Add a row. Raises `DataError` if the file cannot be written, `InputError` for a lone surrogate."""
        for name, given in (("the text", text), ("the answer", answer)):
            utf8(given, name)
        row = dict(zip(self.columns, (text, answer), strict=True))
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - 1, 0))
                is_whole = file.read(1) in (b"", b"\n")  # a row that was cut off keeps its line
                file.write(line if is_whole else b"\n" + line)
        except OSError as error:
            raise DataError(f"cannot write {self.path}: {error.strerror or error}", field="--votes") from error
