"""Readers of rows from files and objects.

A row is ``(text, label index)``, or ``(text, target text)`` for a task without labels. Every `DataError` about a file's
content starts with ``file:line``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedbpt.argument_types import checked
from fedbpt.errors import DataError
from fedbpt.tasks.builtin import AG_NEWS
from fedbpt.tasks.fields import PAIR, Columns, Fields, LabelReader, read_text
from fedbpt.tasks.rows import LabelIndex, Row
from fedbpt.tasks.tables import Record, file_records, first_fields, object_records, only_split
from fedbpt.tasks.task import Task


@checked
def read_rows(
    path: str | os.PathLike[str],
    labels: Sequence[str],
    text_column: str | Sequence[str] = "text",
    label_column: str = "label",
    columns: Sequence[str] | None = None,
) -> list[Row]:
    """Read the rows of a ``.jsonl``, ``.ndjson``, ``.json``, ``.csv`` or ``.tsv`` file.

    The encoding is UTF-8, or UTF-16 with a byte order mark. Empty lines are skipped. A CSV file's delimiter is detected
    from its header line; a TSV file is read without quoting, as GLUE writes it.

    Args:
        path: the file.
        labels: label names in any case; a label may be an index if a number cannot be a name
            (`fedbpt.tasks.fields.LabelReader`). If empty, the label column holds target texts.
        text_column: name of the text column, or several names, of which the first that the file has is read.
        label_column: name of the label column.
        columns: names of all columns, for a CSV file without a header line.

    Raises:
        DataError: no such file, an unknown suffix, not UTF-8, no rows, a missing column, an empty text, an unknown
            label; with file and line.
    """
    wanted = _columns(text_column, label_column, labels)
    rows = list(_rows(file_records(Path(path), wanted.bind, columns), wanted))
    if not rows:
        raise DataError(f"{path} has no rows: add at least one")
    return rows


@checked
def read_task_rows(task: Task, path: str | os.PathLike[str]) -> list[Row]:
    """Read a file's rows for a task, by its column names and word limit. AG News also has its original form, without
    header. Raises `DataError` as `read_rows` does.
    """
    columns = _ag_news_columns(Path(path)) if task.name == "ag-news" else None
    if columns is not None and "title" in columns:
        rows = _read_ag_news_original(Path(path), columns)
    else:
        rows = read_rows(path, task.labels, task.text_columns, task.label_column, columns)
    return [(task.clip(text), label) for text, label in rows]


@checked
def rows_from_dataset(
    dataset: Any, labels: Sequence[str], text_column: str | Sequence[str] = "text", label_column: str = "label"
) -> list[Row]:
    """Read the rows of a `datasets.Dataset`, in any output format, or of another object that `to_rows` takes.

    If the data set names its labels (`ClassLabel`), labels are matched by these names, in any order and case.

    Raises:
        DataError: a missing column, an empty text, an unknown label; with the row's index.
    """
    data = only_split(dataset)
    features = getattr(data, "features", None)
    rows = list(_rows(object_records(data), _columns(text_column, label_column, labels), features))
    if not rows:
        raise DataError("the data has no rows: give at least one")
    return rows


@checked
def to_rows(data: Any, task: Task) -> list[Row]:
    """Convert ``data`` to rows, cut to the task's word limit.

    ``data``: (text, label) pairs, dicts, a dict of columns, a pandas `DataFrame`, a pyarrow `Table`, a
    `datasets.Dataset` or `IterableDataset`, a `DatasetDict` with one split, or the path of a file. Labels are read as
    `read_rows` reads them.

    Raises `DataError`.
    """
    if isinstance(data, str | os.PathLike):
        return read_task_rows(task, data)
    rows = rows_from_dataset(data, task.labels, task.text_columns, task.label_column)
    return [(task.clip(text), label) for text, label in rows]


@checked
def write_rows(path: str | Path, rows: Iterable[Row], labels: Sequence[str]) -> None:
    """Write rows as JSONL, one ``{"text": ..., "label": name}`` per line, which `read_rows` reads back.

    Raises `DataError` if the file cannot be written, or a label's index is out of range.
    """
    try:
        with Path(path).open("w", encoding="utf-8", newline="\n") as file:
            for number, (text, label) in enumerate(rows):
                if not isinstance(label, str) and not 0 <= label < len(labels):
                    raise DataError(
                        f"row {number}: label {label} is out of range: expected 0 to {len(labels) - 1}",
                        field="label",
                        limit=len(labels) - 1,
                    )
                name = label if isinstance(label, str) else labels[label]
                file.write(json.dumps({"text": text, "label": name}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


@checked
def drop_duplicates(rows: Iterable[Row]) -> list[Row]:
    """The first of the rows with each text, in order; texts that differ only in white space are equal."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(" ".join(row[0].split()), row)
    return list(first.values())


def _columns(text: str | Sequence[str], label: str, labels: Sequence[str]) -> Columns:
    return Columns((text,) if isinstance(text, str) else tuple(text), label, tuple(labels))


def _rows(records: Iterable[Record], columns: Columns, features: Any = None) -> Iterator[Row]:
    """Convert records to rows; the order of fields may differ from record to record."""
    known: dict[tuple[str, ...] | None, tuple[Fields, LabelReader]] = {None: (PAIR, LabelReader(columns.labels))}
    for where, names, values in records:
        if names not in known:
            fields = columns.bind(names or (), where)
            named = (features or {}).get(fields.names[fields.label])
            known[names] = fields, LabelReader(columns.labels, getattr(named, "names", None))
        fields, labels = known[names]
        yield fields.text(values, where), labels.read(values[fields.label], where)


def _ag_news_columns(path: Path) -> list[str] | None:
    """Column names of an AG News file without a header line; None if the first line is a header."""
    first = first_fields(path)
    if len(first) == 3 and first[0] in ("1", "2", "3", "4"):
        return ["label", "title", "description"]
    return ["text", "label"] if len(first) == 2 and first[1] in ("0", "1", "2", "3") else None


def _read_ag_news_original(path: Path, columns: Sequence[str]) -> list[Row]:
    """Read the original AG News CSV (Zhang et al. 2015): labels start at 1, title and description are two columns."""
    rows: list[Row] = []
    for where, _, (label, title, description) in file_records(path, lambda _names, _where: None, columns):
        if label not in ("1", "2", "3", "4"):
            expected = "expected 1 to 4 in an original AG News file"
            raise DataError(
                f"{where}: unknown label {label!r}, {expected}",
                public=f"{where}: unknown label, {expected}",
                field="label",
            )
        index = int(label) - 1
        rows.append((read_text(f"{title} {description}", where), LabelIndex(index, AG_NEWS.labels[index])))
    return rows
