"""Drafts of tasks from data files: labels, a word for each, and two templates, ready to edit."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from fedbpt.argument_types import checked
from fedbpt.checking import half_character
from fedbpt.errors import DataError
from fedbpt.protocol.specs import Template, as_name
from fedbpt.tasks.fields import NO_HEADER, Columns, LabelReader, fold, listed, looks_like_row, whole_number
from fedbpt.tasks.tables import Record, file_records
from fedbpt.tasks.task import Task
from fedbpt.tasks.words import WordCosts

TEXT_NAMES: Final = ("text", "sentence", "content", "body", "message", "review", "comment", "question", "description")
LABEL_NAMES: Final = ("label", "class", "category", "topic", "intent", "sentiment", "department", "tag", "target")
"""Names of the columns that may hold the text and the label, most likely first."""

FEW: Final = 8
"""Rows of which nothing follows from how often a label occurs."""

MAX_LABELS: Final = 100
"""Maximum number of distinct values in a label column."""

MAX_LABEL_CHARS: Final = 60
"""Maximum length of a label."""


class Draft(NamedTuple):
    """A drafted task. ``counts``: number of rows of each label, in the task's order."""

    task: Task
    counts: tuple[int, ...]


@checked
def draft_task(
    path: str | Path, name: str | None = None, text_column: str | None = None, label_column: str | None = None
) -> Draft:
    """Draft a task for the rows of a file of a type that `fedbpt.tasks.read_rows` reads.

    Args:
        path: the data file.
        name: name of the task; None: the file's name without suffix.
        text_column, label_column: None: found by name, else by content.

    Raises:
        DataError: as `read_rows` raises; columns that cannot be told apart; a label column with a single value, or with
            too many.
    """
    path = Path(path)
    try:
        columns = _columns_by_name(path, text_column, label_column)
    except _UnknownNamesError:
        columns = _columns_by_content(path, text_column, label_column)
    values = _label_values(path, columns)
    labels = _labels(values, columns, path)
    reader = LabelReader(labels)
    counts = Counter(int(reader.read(value, str(path))) for value in values)
    if label_column is None and len(values) >= FEW and len(labels) > len(values) / 2:
        raise DataError(
            f"{path}: most of the values of column {columns.label!r} occur once ({len(labels)} in {len(values)} rows): "
            "for a task of target texts, write a task file without labels (docs/tasks.md); to classify them all the "
            f"same, give --label-column {columns.label}",
            field="label_column",
        )
    task = Task(
        name=name or as_name(path.stem).lower(),
        labels=labels,
        templates=tuple(Template(pattern=p, label_words=_words(labels)) for p in _patterns(columns.label)),
        text_columns=columns.text,
        label_column=columns.label,
    )
    return Draft(task, tuple(counts[i] for i in range(len(labels))))


@checked
def task_toml(task: Task, costs: Sequence[WordCosts] = (), model: str = "") -> str:
    """Write the task as a commented TOML task file. ``costs``: of its label words with the model named ``model``."""
    numbers = all(whole_number(label) is not None for label in task.labels)
    lines = [
        "# Drafted from a data file. All devices of a run need the same labels, in this order, and the same columns.",
        *(["# These labels are numbers: put their meaning into the label words, not here."] if numbers else []),
        f"name = {_quoted(task.name)}",
        f"labels = {_listed(task.labels)}",
        f"text_columns = {_listed(task.text_columns)}",
        f"label_column = {_quoted(task.label_column)}",
        f"max_text_tokens = {task.max_text_tokens}  # longer texts are cut",
        "",
        "# A run tries each template on training rows and continues with the best. Give one word per label, in the",
        "# order of the labels, each with the space before it; words of one token are the cheapest.",
    ]
    for number, template in enumerate(task.templates):
        lines += ["", "[[templates]]", f"pattern = {_quoted(template.pattern)}"]
        if costs:
            lines.append(f"# {_cost(costs[number], model)}")
        lines.append(f"label_words = {_listed(template.label_words)}")
    return "\n".join(lines) + "\n"


class _UnknownNamesError(DataError):
    """No column has a known name."""


def _columns_by_name(path: Path, text: str | None, label: str | None) -> Columns:
    found: list[Columns] = []

    def choose(names: Sequence[str], where: str) -> None:
        texts = [text] if text else [name for name in TEXT_NAMES if _has(names, name)]
        labels = [label] if label else [name for name in LABEL_NAMES if _has(names, name)]
        if len(names) == 2 and bool(texts) != bool(labels):  # one is known, so the other is known too
            known = (texts or labels)[0]
            other = next((name for name in names if fold(name) != fold(known)), known)
            texts, labels = texts or [other], labels or [other]
        if not (texts and labels):
            raise _UnknownNamesError(f"{where}: no known column names: give --text-column and --label-column")
        columns = Columns((texts[0],), labels[0])
        fields = columns.bind(names, where)
        found.append(Columns((names[fields.places[0]],), names[fields.label]))

    if next(_records(path, choose), None) is None:
        raise DataError(f"{path} has no rows: add at least one for each label")
    return found[-1]


def _columns_by_content(path: Path, text: str | None, label: str | None) -> Columns:
    """Take the column of the longest texts, and the only other column with repeated values."""

    def choose(names: Sequence[str], where: str) -> None:
        if len(names) < 2:
            raise DataError(f"{where}: expected a text and a label column, found one column")

    names: tuple[str, ...] = ()
    values: dict[str, list[str]] = {}
    for record in _records(path, choose):
        names = names or record.names or ()
        for name, value in zip(record.names or (), record.values, strict=True):
            values.setdefault(name, []).append(str(value))
    n_rows = max(len(column) for column in values.values())
    lengths = {name: sum(map(len, column)) / len(column) for name, column in values.items()}
    chosen = text or max(lengths, key=lambda name: lengths[name])
    repeated = [
        name
        for name, column in values.items()
        if name != chosen and 2 <= len(set(map(fold, column))) <= min(MAX_LABELS, n_rows // 2)
    ]
    if looks_like_row(names, (value for column in values.values() for value in column)):
        raise DataError(f"{path}:1: {NO_HEADER}")
    if label is None and len(repeated) != 1:
        raise DataError(
            f"{path}: cannot tell the label column: give --text-column and --label-column, from {listed(names)}",
            field="label_column",
        )
    return Columns((chosen,), label or repeated[0])


def _label_values(path: Path, columns: Columns) -> list[str]:
    values = []
    fields = None
    for where, names, row in _records(path, columns.bind):
        if fields is None or fields.names != names:
            fields = columns.bind(names or (), where)
        fields.text(row, where)
        values.append(_name_of(row[fields.label], where))
    return values


def _name_of(value: Any, where: str) -> str:
    name = str(value) if isinstance(value, bool | int | float) else value
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{where}: no label: fill it in or remove the row", field="label")
    if half := half_character(name):
        raise DataError(f"{where}: the label holds {half}, cut within an emoji or not UTF-8: fix it", field="label")
    return name.strip()


def _labels(values: Sequence[str], columns: Columns, path: Path) -> tuple[str, ...]:
    """Distinct labels in their most frequent spelling, numbers in order, names alphabetically: the same everywhere."""
    spellings: dict[str, Counter[str]] = {}
    for value in values:
        spellings.setdefault(fold(value), Counter())[value] += 1
    labels = [max(counter, key=lambda name: (counter[name], name)) for counter in spellings.values()]
    problem = f"{path}: column {columns.label!r} has {len(labels)} distinct values in {len(values)} rows"
    if len(labels) < 2:
        raise DataError(f"{problem}, a task needs at least two: give --label-column", field="label_column")
    if len(labels) > MAX_LABELS or max(map(len, labels)) > MAX_LABEL_CHARS:
        raise DataError(f"{problem}, too many or too long for labels: give --label-column", field="label_column")
    numbers = {label: whole_number(label) for label in labels}
    if all(number is not None for number in numbers.values()):
        return tuple(sorted(labels, key=lambda label: numbers[label] or 0))
    return tuple(sorted(labels, key=lambda label: (fold(label), label)))


def _words(labels: Sequence[str]) -> tuple[str, ...]:
    """Labels as words of a text: without underscores and hyphens, unless two become equal."""
    words = [" ".join(re.sub(r"[_-]+", " ", label).split()) or label for label in labels]
    return tuple(f" {word}" for word in (words if len(set(words)) == len(words) else labels))


def _patterns(label_column: str) -> tuple[str, str]:
    cue = "Category" if fold(label_column) in ("label", "class", "target", "tag") else label_column.strip()
    return f"{{text}}\n{cue[:1].upper()}{cue[1:]}:", "{text}\nIn one word, this is"


def _records(path: Path, choose: Any) -> Iterator[Record]:
    for record in file_records(path, choose):
        if path.suffix.lower() not in (".csv", ".tsv"):
            choose(record.names or (), record.where)
        yield record


def _has(names: Sequence[str], wanted: str) -> bool:
    return any(fold(name) == wanted for name in names)


def _cost(costs: WordCosts, model: str) -> str:
    if costs.problem:
        return f"cannot be used with {model}: {costs.problem}"
    counts = ", ".join(map(str, costs.tokens))
    return f"tokens of the words with {model}: {counts}; cost {1 + costs.extra} tokens per text and candidate"


def _listed(values: Sequence[str]) -> str:
    return f"[{', '.join(map(_quoted, values))}]"


def _quoted(text: str) -> str:
    # TOML has JSON's escapes, and also requires one for DEL, which JSON leaves as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
