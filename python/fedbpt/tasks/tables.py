"""Data files and Python objects as records of named fields."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Final, NamedTuple, TextIO

from fedbpt.errors import DataError

SUFFIXES: Final = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")

DELIMITERS: Final = (",", ";", "\t", "|")

_BYTE_ORDER_MARKS: Final = (b"\xff\xfe", b"\xfe\xff")


class Record(NamedTuple):
    """A row: column names and a value for each. ``names`` None: a (text, label) pair. ``where`` begins its errors."""

    where: str
    names: tuple[str, ...] | None
    values: Sequence[Any]


CheckHeader = Callable[[Sequence[str], str], object]
"""Raises `DataError` unless the expected columns are among the names; called for each candidate delimiter."""


def file_records(path: Path, check_header: CheckHeader, names: Sequence[str] | None = None) -> Iterator[Record]:
    """Read the records of a file; empty lines are skipped.

    Args:
        path: ``.jsonl`` or ``.ndjson``, ``.json`` (a list of objects), ``.csv`` or ``.tsv``; UTF-8, or UTF-16 with a
            byte order mark. The delimiter is the first with which the header line passes ``check_header``.
        check_header: see `CheckHeader`.
        names: column names, for a CSV file without a header line.

    Raises:
        DataError: the file cannot be read; with file and line.
    """
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        known = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise DataError(f"{path} is not a data file: save it as {known}")
    try:
        if kind in (".csv", ".tsv"):
            yield from _delimited_records(path, check_header, names)
        elif kind == ".json":
            yield from _json_records(path)
        else:
            yield from _json_lines(path)
    except UnicodeDecodeError as error:
        raise _not_text(path, error) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def object_records(data: Any) -> Iterator[Record]:
    """Read the records of (text, label) pairs, dicts, a dict of columns, a pandas `DataFrame`, a pyarrow `Table`, a
    `datasets.Dataset` or `datasets.IterableDataset`.

    Raises `DataError` for any other object.
    """
    if isinstance(data, Mapping):
        return _column_records(data)
    names = getattr(data, "column_names", None)
    if hasattr(data, "with_format"):  # undo an output format such as tensors
        data = data.with_format(None)
    elif hasattr(data, "itertuples"):
        return _table_records(data.columns, data.itertuples(index=False, name=None))
    elif names is not None and hasattr(data, "to_pylist"):
        return _table_records(names, zip(*(column.to_pylist() for column in data.columns), strict=True))
    if isinstance(data, str | bytes) or not isinstance(data, Iterable) or getattr(data, "ndim", 1) == 0:
        raise DataError(
            f"cannot read rows from a {type(data).__name__}: give (text, label) pairs, dicts, a DataFrame, a Dataset "
            "or a file"
        )
    return _item_records(data, "row" if names is None else "data set row")


def only_split(data: Any) -> Any:
    """The split of a `datasets.DatasetDict` with one; any other ``data`` itself. Raises `DataError` for several."""
    if not isinstance(data, Mapping) or any(not hasattr(part, "column_names") for part in data.values()):
        return data
    if len(data) > 1:
        raise DataError(f"the data set has several splits ({', '.join(map(str, data))}): give one, as data[...]")
    return next(iter(data.values()), data)


def first_fields(path: Path) -> list[str]:
    """The fields of the first line of a ``.csv`` file; empty if there is no such file, or no line."""
    if path.suffix.lower() != ".csv" or not path.is_file():
        return []
    try:
        with _opened(path) as file, _long_fields():
            return next(csv.reader(file), [])
    except UnicodeDecodeError as error:
        raise _not_text(path, error) from error
    except csv.Error:  # raised with its line when the rows are read
        return []


# --- JSON ------------------------------------------------------------------------------------------------------------


class _Object(list[tuple[str, Any]]):
    """A JSON object's members, including those with equal names."""


def _json_lines(path: Path) -> Iterator[Record]:
    with _opened(path, None) as file:
        for line, content in enumerate(file, start=1):
            if content.strip():
                where = f"{path}:{line}"
                yield _json_record(_parsed(content, where), where)


def _json_records(path: Path) -> Iterator[Record]:
    with _opened(path, None) as file:
        found = _parsed(file.read(), str(path))
    if not isinstance(found, list) or isinstance(found, _Object):
        raise DataError(f'{path}: expected a list of objects like {{"text": "...", "label": 0}}')
    for number, item in enumerate(found, start=1):
        where = f"{path}, row {number}"
        yield _json_record(item, where)


def _json_record(found: Any, where: str) -> Record:
    if not isinstance(found, _Object):
        raise DataError(f'{where}: expected an object like {{"text": "...", "label": 0}}')
    return Record(where, tuple(name for name, _ in found), [value for _, value in found])


def _parsed(content: str, where: str) -> Any:
    try:
        return json.loads(content, object_pairs_hook=_Object)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise DataError(f"{where}: invalid JSON at {place}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, nesting thousands deep
        raise DataError(f"{where}: invalid JSON: {type(error).__name__}") from error


# --- CSV and TSV -----------------------------------------------------------------------------------------------------


def _delimited_records(path: Path, check_header: CheckHeader, names: Sequence[str] | None) -> Iterator[Record]:
    dialect = _dialect(path, check_header) if names is None else {"delimiter": ","}
    header = None if names is None else tuple(names)
    for line, fields in _delimited_lines(path, dialect):
        where = f"{path}:{line}"
        if header is None:
            header = tuple(_trimmed([name.strip() for name in fields], 1))
            continue
        values = _trimmed(fields, len(header))
        if len(values) != len(header):
            advice = f"quote texts that contain {dialect['delimiter']!r}"
            raise DataError(f"{where}: expected {len(header)} fields, found {len(values)}: {advice}")
        yield Record(where, header, values)


def _dialect(path: Path, check_header: CheckHeader) -> dict[str, Any]:
    """Detect the arguments of `csv.reader`: the first with which the header passes ``check_header``.

    If none does, raises the header's error with the delimiter that gives most columns.
    """
    tabs = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}  # GLUE's format
    dialects: list[dict[str, Any]] = [{"delimiter": delimiter, "strict": True} for delimiter in DELIMITERS]
    if path.suffix.lower() == ".tsv":
        dialects = [tabs, *(dialect for dialect in dialects if dialect["delimiter"] != "\t")]
    most_columns = 0
    problem = DataError(f"{path} has no rows: add at least one below a header line")
    for dialect in dialects:
        header: list[str] = []
        try:
            line, header = next(_delimited_lines(path, dialect), (1, []))
            check_header(_trimmed([name.strip() for name in header], 1), f"{path}:{line}")
            return dialect
        except DataError as error:  # a missing column, or a line that is not valid in this dialect
            if len(header) > most_columns:
                most_columns = len(header)
                problem = error
    raise problem


def _delimited_lines(path: Path, dialect: Mapping[str, Any]) -> Iterator[tuple[int, list[str]]]:
    """Yield each non-empty record with the line that it starts on."""
    with _opened(path) as file, _long_fields():
        first = file.readline()
        has_sep_line = re.fullmatch(r"sep=.[\r\n]*", first)  # written by Excel; the header is enough to detect it
        reader = csv.reader(chain([first] if first and not has_sep_line else [], file), **dialect)
        first_line = 2 if has_sep_line else 1
        start = first_line
        try:
            for fields in reader:
                if any(field.strip() for field in fields):
                    yield start, fields
                start = first_line + reader.line_num
        except csv.Error as error:
            raise DataError(f"{path}:{start}: invalid {path.suffix[1:].upper()}: {error}") from error


def _trimmed(fields: list[str], width: int) -> list[str]:
    """``fields`` without trailing empty ones beyond ``width``, which spreadsheets write."""
    while len(fields) > width and not fields[-1].strip():
        fields = fields[:-1]
    return fields


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lift the limit of `csv` on a field's length, 131,072 characters. It is global, so it is restored."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


# --- objects ---------------------------------------------------------------------------------------------------------


def _column_records(data: Mapping[Any, Any]) -> Iterator[Record]:
    columns = [list(values) for values in data.values() if _is_column(values)]
    if len(columns) != len(data) or len({len(values) for values in columns}) != 1:
        raise DataError('a dict of rows must hold columns of the same length: {"text": [...], "label": [...]}')
    return _table_records(data, zip(*columns, strict=True))


def _table_records(names: Iterable[Any], rows: Iterable[Sequence[Any]]) -> Iterator[Record]:
    columns = tuple(map(str, names))
    return (Record(f"row {i}", columns, row) for i, row in enumerate(rows))


def _is_column(values: Any) -> bool:
    return isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping)


def _item_records(items: Iterable[Any], what: str) -> Iterator[Record]:
    for number, item in enumerate(items):
        where = f"{what} {number}"
        if isinstance(item, Mapping):
            yield Record(where, tuple(map(str, item)), list(item.values()))
        elif isinstance(item, Sequence) and not isinstance(item, str | bytes) and len(item) == 2:
            yield Record(where, None, item)
        else:
            raise DataError(f"{where}: expected a (text, label) pair or a dict")


# --- text files ------------------------------------------------------------------------------------------------------


def _opened(path: Path, newline: str | None = "") -> TextIO:
    with path.open("rb") as file:
        marked = file.read(2) in _BYTE_ORDER_MARKS
    return path.open(encoding="utf-16" if marked else "utf-8-sig", newline=newline)


def _not_text(path: Path, error: UnicodeDecodeError) -> DataError:
    """Build the error for a file that is not UTF-8, with the first invalid byte and its line."""
    if error.encoding.startswith("utf-16"):
        return DataError(f"{path}: invalid UTF-16 after a UTF-16 byte order mark: save it as UTF-8")
    with path.open("rb") as file:
        for number, content in enumerate(file, start=1):
            try:
                content.decode("utf-8")
            except UnicodeDecodeError as found:
                place = f"byte 0x{content[found.start]:02x} at position {found.start + 1} of the line"
                return DataError(f"{path}:{number}: not UTF-8 ({place}): save it as UTF-8")
    return DataError(f"{path}: not UTF-8: save it as UTF-8")
