"""Real-world data files: unambiguous ones are read, others are refused with file and line."""

from __future__ import annotations

import csv
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from fedbpt import tasks
from fedbpt.errors import DataError, FedbptError
from fedbpt.tasks import Task, Template
from fedbpt.tasks.fields import Columns
from tests.support.raises import raises

LABELS = ("billing", "technical")
TASK = Task(
    name="support",
    labels=LABELS,
    templates=(Template(pattern="{text}\nDepartment:", label_words=(" billing", " technical")),),
)
TWO = [("my invoice", 0), ("it is broken", 1)]
LONG = "word " * 40_000


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


READ: dict[str, tuple[str, str | bytes]] = {
    "a blank line at the end": ("a.csv", "text,label\nmy invoice,billing\nit is broken,technical\n\n"),
    "blank lines of white space": ("a.csv", "text,label\n\nmy invoice,billing\n  \nit is broken,technical\n \n\n"),
    "rows of delimiters alone": ("a.csv", "text,label\nmy invoice,billing\n,\nit is broken,technical\n,,\n,,,\n"),
    "delimiters at the end of every line": ("a.csv", "text,label,,\nmy invoice,billing,,\nit is broken,technical,\n"),
    "a header in capitals": ("a.csv", "Text,LABEL\nmy invoice,billing\nit is broken,technical\n"),
    "spaces in the header": ("a.csv", "text , label\nmy invoice,billing\nit is broken,technical\n"),
    "labels in capitals": ("a.csv", "text,label\nmy invoice,Billing\nit is broken, TECHNICAL \n"),
    "semicolons": ("a.csv", "text;label\nmy invoice;billing\nit is broken;technical\n"),
    "semicolons and a mark": ("a.csv", "\ufeffText;Label\r\nmy invoice;billing\r\nit is broken;technical\r\n"),
    "what Excel says of its delimiter": ("a.csv", "sep=;\r\ntext;label\r\nmy invoice;billing\r\nit is broken;1\r\n"),
    "tabs": ("a.csv", "text\tlabel\nmy invoice\tbilling\nit is broken\ttechnical\n"),
    "bars": ("a.csv", "text|label\nmy invoice|billing\nit is broken|technical\n"),
    "commas in a .tsv": ("a.tsv", "text,label\nmy invoice,billing\nit is broken,technical\n"),
    "a name in capitals": ("A.CSV", "text,label\nmy invoice,billing\nit is broken,technical\n"),
    "a TSV in capitals": ("A.TSV", "text\tlabel\nmy invoice\tbilling\nit is broken\ttechnical\n"),
    "other columns": ("a.csv", "id,label,text,note\n1,billing,my invoice,\n2,technical,it is broken,yes\n"),
    "another column twice": ("a.csv", "id,text,id,label\n1,my invoice,2,billing\n1,it is broken,2,technical\n"),
    "one column as it is written, one not": ("a.csv", "text,Text,label\nmy invoice,x,0\nit is broken,y,1\n"),
    "line ends of old": ("a.csv", "text,label\rmy invoice,billing\rit is broken,technical\r"),
    "UTF-16 with its mark": ("a.csv", "text,label\nmy invoice,billing\nit is broken,technical\n".encode("utf-16")),
    "quoted, with semicolons": ("a.csv", '"text";"label"\n"my invoice";"billing"\n"it is broken";"technical"\n'),
    "no line end at the end": ("a.csv", "text,label\nmy invoice,billing\nit is broken,technical"),
    "ndjson": ("a.ndjson", '{"text": "my invoice", "label": "billing"}\n{"text": "it is broken", "label": 1}\n'),
    "blank lines in JSON lines": (
        "A.JSONL",
        '\n{"text": "my invoice", "label": "Billing"}\n\n{"Text": "it is broken", "LABEL": 1}\n \n',
    ),
    "JSON lines with a mark": (
        "a.jsonl",
        '\ufeff{"text": "my invoice", "label": 0}\r\n{"text": "it is broken", "label": 1}\r\n',
    ),
    "a list of objects": ("a.json", '[{"text": "my invoice", "label": 0},\n {"label": 1, "text": "it is broken"}]'),
}


@pytest.mark.parametrize("form", READ)
def test_what_is_unambiguous_is_read(tmp_path: Path, form: str) -> None:
    path = write(tmp_path, *READ[form])
    assert tasks.read_task_rows(TASK, path) == TWO
    assert tasks.to_rows(str(path), TASK) == TWO


REFUSED: dict[str, tuple[str, str | bytes, str]] = {
    "a text column twice": ("a.csv", "text,text,label\nmy invoice,x,0\n", r"a\.csv:1: .*'text'.* 2 times"),
    "a label column twice": ("a.csv", "text,label,label\nmy invoice,0,1\n", r"a\.csv:1: .*'label'.* 2 times"),
    "twice in other case": ("a.csv", "TEXT,Text,label\nmy invoice,x,0\n", r"a\.csv:1: .*'TEXT' and 'Text'"),
    "an object's key twice": ("a.jsonl", '{"text": "my invoice", "text": "x", "label": 0}\n', r"a\.jsonl:1: .*2 times"),
    "no header": ("a.csv", "my invoice,billing\nit is broken,technical\n", r"a\.csv:1: .*'text'.*\(text,label\)"),
    "no header, index": ("a.csv", "my invoice;0\nit is broken;1\n", r"a\.csv:1: .*'text'.*\(text,label\)"),
    "no header, quoted": (
        "a.csv",
        '"my invoice","billing"\n"it is","technical"\n',
        r"a\.csv:1: .*'text'.*\(text,label\)",
    ),
    "no header, long": ("a.csv", f"my invoice {LONG}\n", r"a\.csv:1: .*'text'.*\(text,label\)"),
    "a comma too many": ("a.csv", "text,label\nno, my invoice,billing\n", r"a\.csv:2: .*2 .* 3.*','"),
    "a field too few": ("a.csv", "text,label\nmy invoice\n", r"a\.csv:2: .*2 .* 1"),
    "a label missing": ("a.csv", "text,label\nmy invoice,\n", r"a\.csv:2: .*''"),
    "a text missing": ("a.csv", "text,label\nmy invoice,0\n,billing\n", r"a\.csv:3: "),
    "a quote that is not closed": ("a.csv", 'text,label\n"my invoice,0\nit is,1\n', r"a\.csv:2: .*CSV"),
    "Latin-1": (
        "a.csv",
        b"text,label\nit is fine,0\nmy invo\xefce,0\n",
        r"a\.csv:3: .*UTF-8 \(byte 0xef at position 8",
    ),
    "Latin-1, far in": ("a.csv", b"text,label\n" + b"my invoice,0\n" * 5000 + b"\xff,0\n", r"a\.csv:5002: .*0xff"),
    "Latin-1 in JSON lines": ("a.jsonl", b'{"text": "my invoice", "label": 0}\n"\xe9"\n', r"a\.jsonl:2: .*0xe9"),
    "Latin-1 in a header": ("a.tsv", b"text\tlabel\tpr\xe9nom\nmy invoice\t0\tx\n", r"a\.tsv:1: .*0xe9"),
    "UTF-16, cut": ("a.csv", "text,label\nmy invoice,0\n".encode("utf-16")[:-1], r"a\.csv: .*UTF-16"),
    "a spreadsheet": ("a.xlsx", b"PK\x03\x04", r"a\.xlsx .*\.csv"),
    "JSON with a fault": ("a.json", '[{"text": "my invoice",\n "label": }]', r"a\.json: .*JSON.*line 2"),
    "one object": ("a.json", '{"text": "my invoice", "label": 0}', r"a\.json: .*\[?\{"),
    "a number of 5,000 digits": (
        "a.jsonl",
        f'{{"text": "my invoice", "label": {"9" * 5000}}}',
        r"a\.jsonl:1: .*JSON",
    ),
    "a depth of 100,000": ("a.jsonl", "[" * 100_000, r"a\.jsonl:1: .*JSON"),
    "only blank lines": ("a.csv", "text,label\n\n,\n", r"a\.csv "),
    "nothing": ("a.csv", "", r"a\.csv "),
    "another label, far in": ("a.csv", "text,label\n\n\nmy invoice,0\nit is,sales\n", r"a\.csv:5: .*'sales'"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_ambiguous_files_are_refused_with_file_and_line(tmp_path: Path, form: str) -> None:
    name, content, pattern = REFUSED[form]
    with pytest.raises(DataError, match=pattern) as caught:
        tasks.read_task_rows(TASK, write(tmp_path, name, content))
    for message in (str(caught.value), caught.value.public):
        assert "\n" not in message
        assert len(message) < 400
        assert "invoice" not in message
    assert "sales" not in caught.value.public


def test_a_long_field_is_read_and_the_global_limit_is_restored(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = write(tmp_path, "a.csv", f'text,label\n"{LONG}",0\n"{LONG[:-1]}\n and, more",1\n')
    (first, second) = tasks.read_task_rows(TASK, path)
    assert (len(first[0]), first[1]) == (len(LONG.strip()), 0)
    assert second[0].endswith("word and, more")
    assert csv.field_size_limit() == before


def test_the_limit_is_restored_if_reading_stops_early(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    with pytest.raises(DataError):
        tasks.read_task_rows(TASK, write(tmp_path, "a.csv", "text,label\nx,0\ny,7\nz,1\n"))
    assert csv.field_size_limit() == before


def test_lines_are_counted_as_an_editor_counts_them(tmp_path: Path) -> None:
    content = 'sep=;\r\ntext;label\r\n"two\r\nlines";0\r\n\r\nmy text;0\r\nlast;sales\r\n'
    with pytest.raises(DataError, match=r"a\.csv:7: "):
        tasks.read_task_rows(TASK, write(tmp_path, "a.csv", content))


def test_the_first_text_column_that_is_written_so_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "Text,body,label\nno,yes,0\n")
    assert tasks.read_rows(path, LABELS, ("text", "body")) == [("yes", 0)]
    assert tasks.read_rows(path, LABELS, ("text", "subject")) == [("no", 0)]
    assert tasks.read_rows(path, LABELS, ("{TEXT} and {Body}",)) == [("no and yes", 0)]


def test_ag_news_in_its_original_form_may_be_named_in_capitals(tmp_path: Path) -> None:
    path = write(tmp_path, "TRAIN.CSV", '"3","Shares fall","Oil  rises"\n\n"4","New chip","It is fast"\n')
    assert tasks.read_task_rows(tasks.load("ag-news"), path) == [
        ("Shares fall Oil rises", 2),
        ("New chip It is fast", 3),
    ]


@pytest.mark.parametrize(
    ("data", "pattern"),
    [
        (None, "NoneType"),
        (7, "int"),
        (["my invoice"], "row 0: "),
        ([("my invoice", 0, 1)], "row 0: "),
        ([{"text": "my invoice"}], "row 0: .*'label'"),
        ([{"text": "x", "label": 0}, {"Text": "y", "text ": "my invoice", "label": 0}], "row 1: .*'Text' and 'text '"),
        ([{}], "row 0: .*'text'"),
        ({"text": ["my invoice"], "label": [0, 1]}, "text.*label"),
        ({"text": "my invoice", "label": 0}, "text.*label"),
        ({}, "text.*label"),
        ([], "data"),
        (iter([]), "data"),
    ],
)
def test_objects_without_rows_are_refused(data: Any, pattern: str) -> None:
    with pytest.raises(DataError, match=pattern) as caught:
        tasks.to_rows(data, TASK)
    assert "invoice" not in str(caught.value)


def test_rows_may_come_one_by_one_and_in_either_form() -> None:
    given = iter([("my invoice", 0), {"label": "Technical", "text": "it is broken"}])
    assert tasks.to_rows(given, TASK) == TWO


def test_a_data_set_of_several_splits_names_them() -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    part = datasets.Dataset.from_dict({"text": ["my invoice"], "label": [0]})
    for made in (datasets.DatasetDict, datasets.IterableDatasetDict):
        with pytest.raises(DataError, match="train, test"):
            tasks.to_rows(made({"train": part, "test": part}), TASK)
        with pytest.raises(DataError):
            tasks.to_rows(made({}), TASK)


def test_a_table_with_a_column_twice_is_refused_and_without_it_is_read() -> None:
    pandas = pytest.importorskip("pandas", reason="comes with the extra `data`")
    table = pandas.DataFrame([["my invoice", 0, 1]], columns=["text", "label", "label"])
    with pytest.raises(DataError, match=r"'label'.* 2 times"):
        tasks.to_rows(table, TASK)
    assert tasks.to_rows(table.iloc[:, :2], TASK) == TWO[:1]


def test_errors_with_data_know_what_may_leave_the_machine() -> None:
    assert FedbptError("all of it").public == "all of it"
    assert FedbptError("all of it", public="a part").public == "a part"


def test_files_are_read_in_several_threads_at_once(tmp_path: Path) -> None:
    paths = [write(tmp_path, f"{i}.csv", "text,label\n" + f'"{LONG}",0\n' * 5) for i in range(4)]
    found: list[int] = []
    threads = [threading.Thread(target=lambda p=p: found.append(len(tasks.read_task_rows(TASK, p)))) for p in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [5] * 4


def test_what_partition_writes_is_read_back(tmp_path: Path) -> None:
    rows = [(f"text {i}; with, all\tof | it", i % 2) for i in range(9)]
    tasks.write_rows(tmp_path / "r.jsonl", rows, LABELS)
    assert json.loads((tmp_path / "r.jsonl").read_text().splitlines()[0])["label"] == "billing"
    assert [label for _, label in tasks.read_task_rows(TASK, tmp_path / "r.jsonl")] == [label for _, label in rows]


def test_a_missing_header_is_named_by_the_tasks_own_columns() -> None:
    columns = Columns(("{premise} So: {hypothesis}",), "verdict", ("yes", "no"))
    with raises(DataError) as caught:
        columns.bind(("it rains", "the street is wet", "yes"), "a.csv:1")
    assert "(premise,hypothesis,verdict)" in str(caught.value)
