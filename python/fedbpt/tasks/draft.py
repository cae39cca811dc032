"""A task drafted from a data file: its labels, a word for each, and two templates, ready to edit."""

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
"""Columns that are taken for the text and for the label, in this order."""

MAX_LABELS: Final = 100
"""More different values than that are no labels."""

LABEL_CHARACTERS: Final = 60
"""Longest name of a label."""


class Draft(NamedTuple):
    """``counts``: rows of each label, in the task's order."""

    task: Task
    counts: tuple[int, ...]


@checked
def draft_task(
    path: str | Path, name: str | None = None, text_column: str | None = None, label_column: str | None = None
) -> Draft:
    """A task for the rows of a file (`fedbpt.tasks.read_rows` says which files).

    Args:
        path: the file.
        name: the task's; None: the file's.
        text_column, label_column: None: found by their names, else by what stands in them.

    Raises:
        DataError: what `read_rows` raises; columns that cannot be told apart, a label column with one value or with too
            many to be labels.
    """
    path = Path(path)
    given = (text_column, label_column)
    try:
        columns = _named_columns(path, *given)
    except _UnclearError:
        columns = _columns_by_content(path, *given)
    values = _label_values(path, columns)
    labels = _labels(values, columns, path)
    reader = LabelReader(labels)
    counts = Counter(int(reader.read(value, str(path))) for value in values)
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
    """The task as the text of a task file, with what to edit; ``costs``: of its label words with ``model``."""
    numbers = all(whole_number(label) is not None for label in task.labels)
    lines = [
        "# Drafted from a data file. All devices of a run need the same labels, in this order, and the same columns.",
        *(["# These labels are numbers; say what they mean by the label words, not here."] if numbers else []),
        f"name = {_quoted(task.name)}",
        f"labels = {_listed(task.labels)}",
        f"text_columns = {_listed(task.text_columns)}",
        f"label_column = {_quoted(task.label_column)}",
        f"max_text_tokens = {task.max_text_tokens}  # of a text; what comes after is not read",
        "",
        "# A run tries each template on training rows and goes on with the best. There is a word for each label, in",
        "# the order of the labels, with the space before it; words of one token are the cheapest.",
    ]
    for number, template in enumerate(task.templates):
        lines += ["", "[[templates]]", f"pattern = {_quoted(template.pattern)}"]
        if costs:
            lines.append(f"# {_cost(costs[number], model)}")
        lines.append(f"label_words = {_listed(template.label_words)}")
    return "\n".join(lines) + "\n"


class _UnclearError(DataError):
    """The columns' names do not tell which is which."""


def _named_columns(path: Path, text: str | None, label: str | None) -> Columns:
    found: list[Columns] = []

    def choose(names: Sequence[str], where: str) -> None:
        texts = [text] if text else [name for name in TEXT_NAMES if _has(names, name)]
        labels = [label] if label else [name for name in LABEL_NAMES if _has(names, name)]
        if len(names) == 2 and bool(texts) != bool(labels):  # the other one
            known = (texts or labels)[0]
            other = next((name for name in names if fold(name) != fold(known)), known)
            texts, labels = texts or [other], labels or [other]
        if not (texts and labels):
            raise _UnclearError(f"{where}: no column is called text or label")
        columns = Columns((texts[0],), labels[0])
        fields = columns.bind(names, where)
        found.append(Columns((names[fields.places[0]],), names[fields.label]))

    if next(_records(path, choose), None) is None:
        raise DataError(f"{path} holds no rows")
    return found[-1]


def _columns_by_content(path: Path, text: str | None, label: str | None) -> Columns:
    """The column of the longest texts, and the only other one whose values come again and again."""

    def choose(names: Sequence[str], where: str) -> None:
        if len(names) < 2:
            raise DataError(f"{where}: one column is not enough for texts and labels")

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
        known = f"which column is the label? give --text-column and --label-column, of {listed(names)}"
        raise DataError(f"{path}: {known}")
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
        raise DataError(f"{where}: no label: fill it in or remove the row")
    if half := half_character(name):
        raise DataError(f"{where}: {half} in the label: it was cut within an emoji, mend it")
    return name.strip()


def _labels(values: Sequence[str], columns: Columns, path: Path) -> tuple[str, ...]:
    """Each label as it is written most often: numbers by value, names by alphabet, so that all devices agree."""
    spellings: dict[str, Counter[str]] = {}
    for value in values:
        spellings.setdefault(fold(value), Counter())[value] += 1
    labels = [max(counter, key=lambda name: (counter[name], name)) for counter in spellings.values()]
    problem = f"{path}: column {columns.label!r} has {len(labels)} different values in {len(values)} rows"
    if len(labels) < 2:
        raise DataError(f"{problem}: a task needs two labels or more, give --label-column")
    if len(labels) > MAX_LABELS or max(map(len, labels)) > LABEL_CHARACTERS:
        raise DataError(f"{problem}, too many or too long for labels: give --label-column")
    numbers = {label: whole_number(label) for label in labels}
    if all(number is not None for number in numbers.values()):
        return tuple(sorted(labels, key=lambda label: numbers[label] or 0))
    return tuple(sorted(labels, key=lambda label: (fold(label), label)))


def _words(labels: Sequence[str]) -> tuple[str, ...]:
    """Labels as they would stand in a text: names of programs in words, where these stay distinct."""
    words = [" ".join(re.sub(r"[_-]+", " ", label).split()) or label for label in labels]
    return tuple(f" {word}" for word in (words if len(set(words)) == len(words) else labels))


def _patterns(label_column: str) -> tuple[str, str]:
    asked = "Category" if fold(label_column) in ("label", "class", "target", "tag") else label_column.strip()
    return f"{{text}}\n{asked[:1].upper()}{asked[1:]}:", "{text}\nIn one word, this is"


def _records(path: Path, choose: Any) -> Iterator[Record]:
    for record in file_records(path, choose):
        if path.suffix.lower() not in (".csv", ".tsv"):
            choose(record.names or (), record.where)
        yield record


def _has(names: Sequence[str], wanted: str) -> bool:
    return any(fold(name) == wanted for name in names)


def _cost(costs: WordCosts, model: str) -> str:
    if costs.problem:
        return f"with {model} it cannot be used: {costs.problem}"
    counts = ", ".join(map(str, costs.tokens))
    return f"tokens of the words with {model}: {counts}; a candidate costs {1 + costs.extra} tokens a text"


def _listed(values: Sequence[str]) -> str:
    return f"[{', '.join(map(_quoted, values))}]"


def _quoted(text: str) -> str:
    # JSON's escapes are TOML's, but for the one control character that JSON leaves as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
