"""Rows of labelled texts from files and objects.

A row is ``(text, label index)``, or ``(text, target text)`` where a task has no labels. Every complaint about a file is
a `DataError` that starts with ``file:line``.
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
    """Rows of a ``.jsonl``, ``.ndjson``, ``.json``, ``.csv`` or ``.tsv`` file (UTF-8, or UTF-16 with its mark).

    A label is one of the names in ``labels``, whatever its case, or an index where a number cannot be a name
    (`fedbpt.tasks.fields.LabelReader`); with no ``labels`` it is a target text. ``text_column`` may list several names:
    the first that the file has is read. ``columns`` names the columns of a CSV file that has no header line. The
    delimiter follows from the header line; a TSV file is read without quoting, as GLUE writes it. Empty lines are left
    out.

    Raises:
        DataError: no such file, another kind of file, not UTF-8, no rows, a missing column, an empty text, an unknown
            label; with file and line.
    """
    wanted = _columns(text_column, label_column, labels)
    rows = list(_rows(file_records(Path(path), wanted.bind, columns), wanted))
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows


@checked
def read_task_rows(task: Task, path: str | os.PathLike[str]) -> list[Row]:
    """Rows of a file for a task: its column names, its word limit; for AG News also the original form without header.

    Raises `DataError` as `read_rows` does.
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
    """Rows of a `datasets.Dataset`, in whatever format it shows its values, or of another object that `to_rows` takes.

    Where the data set names its labels (`ClassLabel`), these names decide, in whatever order, number and case.

    Raises:
        DataError: a missing column, an empty text, an unknown label; with the row's index.
    """
    data = only_split(dataset)
    features = getattr(data, "features", None)
    rows = list(_rows(object_records(data), _columns(text_column, label_column, labels), features))
    if not rows:
        raise DataError("no rows given")
    return rows


@checked
def to_rows(data: Any, task: Task) -> list[Row]:
    """``data``, as a caller may give it, as rows cut to the task's word limit.

    ``data``: (text, label) pairs, dicts, a dict of columns, a pandas `DataFrame`, a pyarrow `Table`, a
    `datasets.Dataset` or `IterableDataset`, a `DatasetDict` of one split, or a file's path. A label means what it means
    in a file (`read_rows`).

    Raises `DataError`.
    """
    if isinstance(data, str | os.PathLike):
        return read_task_rows(task, data)
    rows = rows_from_dataset(data, task.labels, task.text_columns, task.label_column)
    return [(task.clip(text), label) for text, label in rows]


@checked
def write_rows(path: str | Path, rows: Iterable[Row], labels: Sequence[str]) -> None:
    """Write rows as JSONL, one ``{"text": ..., "label": name}`` a line; `read_rows` gives them back.

    Raises `DataError`: the file cannot be written, a label's index that is not one of ``labels``.
    """
    try:
        with Path(path).open("w", encoding="utf-8", newline="\n") as file:
            for number, (text, label) in enumerate(rows):
                if not isinstance(label, str) and not 0 <= label < len(labels):
                    raise DataError(f"row {number}: there is no label {label} among the {len(labels)} labels")
                name = label if isinstance(label, str) else labels[label]
                file.write(json.dumps({"text": text, "label": name}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


@checked
def drop_duplicates(rows: Iterable[Row]) -> list[Row]:
    """Rows whose text (white space aside) was not seen before, in order."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(" ".join(row[0].split()), row)
    return list(first.values())


def _columns(text: str | Sequence[str], label: str, labels: Sequence[str]) -> Columns:
    return Columns((text,) if isinstance(text, str) else tuple(text), label, tuple(labels))


def _rows(records: Iterable[Record], columns: Columns, features: Any = None) -> Iterator[Row]:
    """The rows that ``records`` are, whose fields may come in another order from one to the next."""
    known: dict[tuple[str, ...] | None, tuple[Fields, LabelReader]] = {None: (PAIR, LabelReader(columns.labels))}
    for where, names, values in records:
        if names not in known:
            fields = columns.bind(names or (), where)
            named = (features or {}).get(fields.names[fields.label])
            known[names] = fields, LabelReader(columns.labels, getattr(named, "names", None))
        fields, labels = known[names]
        yield fields.text(values, where), labels.read(values[fields.label], where)


def _ag_news_columns(path: Path) -> list[str] | None:
    """Column names for AG News files without a header line; None where the first line is a header."""
    first = first_fields(path)
    if len(first) == 3 and first[0] in ("1", "2", "3", "4"):
        return ["label", "title", "description"]
    return ["text", "label"] if len(first) == 2 and first[1] in ("0", "1", "2", "3") else None


def _read_ag_news_original(path: Path, columns: Sequence[str]) -> list[Row]:
    """The original AG News CSV (Zhang et al. 2015): labels from 1, title and description apart."""
    rows: list[Row] = []
    for where, _, (label, title, description) in file_records(path, lambda _names, _where: None, columns):
        if label not in ("1", "2", "3", "4"):
            known = "the original AG News has labels 1 to 4"
            raise DataError(f"{where}: unknown label {label!r}: {known}", public=f"{where}: {known}")
        index = int(label) - 1
        rows.append((read_text(f"{title} {description}", where), LabelIndex(index, AG_NEWS.labels[index])))
    return rows
