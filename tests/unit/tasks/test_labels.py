"""A row has the same label, or is refused, in every format."""

from __future__ import annotations

import csv
import io
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbpt import tasks
from fedbpt.errors import DataError
from fedbpt.tasks import Task, Template
from fedbpt.tasks.rows import targets_of

datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
pandas = pytest.importorskip("pandas", reason="comes with the extra `data`")
pyarrow = pytest.importorskip("pyarrow", reason="comes with the extra `data`")
torch = pytest.importorskip("torch", reason="not installed")

REFUSED = "refused"


def task_of(labels: Sequence[str]) -> Task:
    words = tuple(f" w{i}" for i in range(len(labels)))
    return Task(name="t", labels=tuple(labels), templates=(Template(pattern="{text}\nIt is", label_words=words),))


# --- every reader ----------------------------------------------------------------------------------------------------

Reader = Callable[[Path, Any], Any]
"""Builds an object that `to_rows` reads, with one row of text "awful" and a given label."""


def delimited(suffix: str, delimiter: str) -> Reader:
    def make(folder: Path, label: Any) -> Path:
        written = io.StringIO()
        csv.writer(written, delimiter=delimiter).writerows([("text", "label"), ("awful", label)])
        (folder / f"rows{suffix}").write_text(written.getvalue(), newline="")
        return folder / f"rows{suffix}"

    return make


def as_json(suffix: str, form: str) -> Reader:
    def make(folder: Path, label: Any) -> Path:
        (folder / f"rows{suffix}").write_text(form % json.dumps({"text": "awful", "label": label}))
        return folder / f"rows{suffix}"

    return make


def data_set(_: Path, label: Any) -> Any:
    return datasets.Dataset.from_dict({"text": ["awful"], "label": [label]})


READERS: dict[str, Reader] = {
    "csv": delimited(".csv", ","),
    "CSV of Excel": delimited(".CSV", ";"),
    "tsv": delimited(".tsv", "\t"),
    "jsonl": as_json(".jsonl", "%s\n"),
    "ndjson": as_json(".ndjson", "%s\n"),
    "json": as_json(".json", "[%s]"),
    "pair": lambda _, label: [("awful", label)],
    "dict": lambda _, label: [{"text": "awful", "label": label}],
    "dict of columns": lambda _, label: {"text": ["awful"], "label": [label]},
    "numpy": lambda _, label: [("awful", np.asarray([label])[0])],
    "tensor": lambda _, label: [("awful", label if isinstance(label, str) else torch.tensor(label))],
    "DataFrame": lambda _, label: pandas.DataFrame({"text": ["awful"], "label": [label]}),
    "DataFrame of categories": lambda _, label: pandas.DataFrame(
        {"text": ["awful"], "label": pandas.Series([label], dtype="category")}
    ),
    "Table": lambda _, label: pyarrow.table({"text": ["awful"], "label": [label]}),
    "Dataset": data_set,
    "Dataset, numpy": lambda folder, label: data_set(folder, label).with_format("numpy"),
    "Dataset, torch": lambda folder, label: data_set(folder, label).with_format("torch"),
    "Dataset, pandas": lambda folder, label: data_set(folder, label).with_format("pandas"),
    "Dataset, arrow": lambda folder, label: data_set(folder, label).with_format("arrow"),
    "DatasetDict": lambda folder, label: datasets.DatasetDict({"train": data_set(folder, label)}),
    "IterableDataset": lambda folder, label: data_set(folder, label).to_iterable_dataset(),
    "IterableDataset, mapped": lambda folder, label: data_set(folder, label).to_iterable_dataset().map(dict),
    "IterableDatasetDict": lambda folder, label: datasets.IterableDatasetDict(
        {"train": data_set(folder, label).to_iterable_dataset()}
    ),
}

STARS = ("1", "2", "3", "4")
MOOD = ("negative", "positive")
RATED = ("1 star", "2 stars", "3 stars")

CASES: list[tuple[tuple[str, ...], Any, Any]] = [
    # a name, however it is written
    (MOOD, "positive", 1),
    (MOOD, " positive ", 1),
    (MOOD, "Positive", 1),
    (MOOD, "POSITIVE", 1),
    (("Credit Card", "Loan"), "credit  card", 0),
    (("Café", "Bar"), "cafe\u0301", 0),
    (("Polish", "polish"), "polish", 1),
    (("Polish", "polish"), "POLISH", REFUSED),
    (MOOD, "pos", REFUSED),
    (MOOD, "", REFUSED),
    # an index, where it cannot be a name
    (MOOD, 0, 0),
    (MOOD, 1, 1),
    (MOOD, "1", 1),
    (MOOD, 1.0, 1),
    (MOOD, "1.0", 1),
    (MOOD, 2, REFUSED),
    (MOOD, -1, REFUSED),
    (MOOD, 0.5, REFUSED),
    # numbers that are names
    (STARS, 1, 0),
    (STARS, "1", 0),
    (STARS, 4, 3),
    (STARS, 4.0, 3),
    (STARS, 0, REFUSED),
    (STARS, "0", REFUSED),
    (STARS, 5, REFUSED),
    (("1", "0"), 0, 1),
    (("1", "0"), "1", 0),
    (("01", "02"), 1, 0),
    (("01", "02"), "2", 1),
    (("1", "01"), 1, 0),
    (("-1", "0", "1"), -1, 0),
    (("001", "01"), 1, REFUSED),
    (("1.5", "2.5"), 1, REFUSED),
    (("low", "1"), 0, REFUSED),
    # numbers that could be either
    (RATED, "2 Stars", 1),
    (RATED, 0, 0),
    (RATED, 1, REFUSED),
    (RATED, "2", REFUSED),
    (("v1", "v2"), 1, REFUSED),
    (("v0", "v1"), 1, 1),
    (("page 0", "page 1", "chapter 1"), 1, REFUSED),
    (("covid-19", "flu"), 1, 1),
    # truth
    (("true", "false"), True, 0),
    (("False", "True"), True, 1),
    (MOOD, True, REFUSED),
    (("0", "1"), True, REFUSED),
]


@pytest.mark.parametrize(("labels", "value", "meant"), CASES)
def test_a_label_means_the_same_by_every_reader(tmp_path: Path, labels: Any, value: Any, meant: Any) -> None:
    task, found, said = task_of(labels), {}, {}
    for name, make in READERS.items():
        try:
            ((text, found[name]),) = tasks.to_rows(make(tmp_path, value), task)
            assert text == "awful"
        except DataError as error:
            found[name], said[name] = REFUSED, (str(error), error.public)
    assert found == dict.fromkeys(READERS, meant)
    assert not [shown for each in said.values() for shown in each if "awful" in shown]


@pytest.mark.parametrize("value", [None, float("nan"), [1], {"a": 1}, b"positive"])
def test_an_invalid_label_is_refused(value: Any) -> None:
    for rows in ([("awful", value)], [{"text": "awful", "label": value}]):
        with pytest.raises(DataError, match="row 0"):
            tasks.to_rows(rows, task_of(MOOD))


@pytest.mark.parametrize("labels", [STARS, RATED, ("1", "0"), ("v1", "v2"), MOOD])
def test_rows_that_were_read_once_keep_their_labels_when_they_are_read_again(tmp_path: Path, labels: Any) -> None:
    task = task_of(labels)
    once = tasks.to_rows([(f"text {i}", name) for i, name in enumerate(labels)], task)
    assert [index for _, index in once] == list(range(len(labels)))
    assert tasks.to_rows(once, task) == once
    assert tasks.to_rows(tasks.split_rows(once, {"all": len(once)})["all"][::-1], task)
    tasks.write_rows(tmp_path / "rows.jsonl", once, labels)
    assert tasks.to_rows(tmp_path / "rows.jsonl", task) == once


def test_rows_read_for_another_label_order_are_never_scored() -> None:
    once = tasks.to_rows([("a", 0), ("b", 1)], task_of(MOOD))
    assert targets_of(once, MOOD).tolist() == [0, 1]
    with pytest.raises(DataError, match="row 0"):
        targets_of(once, MOOD[::-1])


def test_rows_that_were_read_for_another_task_keep_their_labels_names() -> None:
    once = tasks.to_rows([("a", 0), ("b", 1)], task_of(MOOD))
    assert tasks.to_rows(once, task_of(MOOD[::-1])) == [("a", 1), ("b", 0)]
    assert tasks.to_rows(once, task_of(("neutral", *MOOD))) == [("a", 1), ("b", 2)]
    assert tasks.to_rows(pickle.loads(pickle.dumps(once)), task_of(MOOD[::-1])) == [("a", 1), ("b", 0)]
    for others in (STARS, ("positive", "bad")):
        with pytest.raises(DataError, match="row 0"):
            tasks.to_rows(once, task_of(others))


def test_a_missing_label_in_a_column_of_numbers_is_the_one_that_is_refused() -> None:
    table = pandas.DataFrame({"text": ["a", "b", "c"], "label": [0, None, 1]})
    with pytest.raises(DataError, match="row 1"):
        tasks.to_rows(table, task_of(MOOD))
    assert tasks.to_rows(table.dropna(), task_of(MOOD)) == [("a", 0), ("c", 1)]


def test_a_target_text_is_taken_as_it_is(tmp_path: Path) -> None:
    task = Task(name="t", templates=(Template(pattern="{text}\nIt is", label_words=()),))
    for make in READERS.values():
        assert tasks.to_rows(make(tmp_path, "1 Of A Kind"), task) == [("awful", "1 Of A Kind")]


# --- a data set that names its labels --------------------------------------------------------------------------------

NAMED: list[tuple[str, list[str], list[Any]]] = [
    ("in the task's order", ["negative", "positive"], [0, 1]),
    ("in another order", ["positive", "negative"], [1, 0]),
    ("with more names", ["neutral", "negative", "positive"], [REFUSED, 0, 1]),
    ("with only some", ["positive"], [1]),
    ("in other case", ["Positive", "NEGATIVE"], [1, 0]),
    ("unrelated", ["ham", "spam"], [REFUSED, REFUSED]),
    ("abbreviated", ["neg", "pos"], [REFUSED, REFUSED]),
    ("numbered from 0, which names nothing", ["0", "1"], [0, 1]),
    ("numbers in another order", ["1", "0"], [REFUSED, REFUSED]),
    ("numbered from 1", ["1", "2"], [REFUSED, REFUSED]),
]

SHOWN: dict[str, Callable[[Any], Any]] = {
    "plain": lambda data: data,
    **{form: lambda data, form=form: data.with_format(form) for form in ("numpy", "torch", "pandas", "arrow")},
    "of a dict": lambda data: datasets.DatasetDict({"test": data}),
    "iterable": lambda data: data.to_iterable_dataset(),
    "iterable, numpy": lambda data: data.to_iterable_dataset().with_format("numpy"),
}


@pytest.mark.parametrize(("names", "meant"), [case[1:] for case in NAMED], ids=[case[0] for case in NAMED])
def test_the_names_of_a_data_set_decide_in_every_format(names: list[str], meant: list[Any]) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    for form, show in SHOWN.items():
        found: list[Any] = []
        for index in range(len(names)):
            data = datasets.Dataset.from_dict({"text": ["awful"], "label": [index]}, features=features)
            try:
                found.append(tasks.to_rows(show(data), task_of(MOOD))[0][1])
            except DataError:
                found.append(REFUSED)
        assert (form, found) == (form, meant)


def test_a_data_sets_number_that_it_does_not_name_is_refused() -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(MOOD))})
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, -1]}, features=features)
    with pytest.raises(DataError, match="data set row 1"):
        tasks.to_rows(data, task_of(MOOD))


def test_a_data_sets_names_are_found_under_a_column_of_another_case() -> None:
    features = datasets.Features({"Text": datasets.Value("string"), "Label": datasets.ClassLabel(names=["b", "a"])})
    data = datasets.Dataset.from_dict({"Text": ["x"], "Label": [0]}, features=features)
    assert tasks.to_rows(data, task_of(("a", "b"))) == [("x", 1)]
