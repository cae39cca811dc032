"""Task files drafted from data files, which can then read the files' rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbpt import cli, tasks
from fedbpt.cli import tasks as tasks_command
from fedbpt.errors import ConfigError, DataError
from fedbpt.protocol.specs import Template
from fedbpt.tasks import Task, draft_task, load_task, read_task_rows, task_toml, word_costs
from tests.support.raises import raises
from tests.support.toy_scorer import ToyScorer

SUPPORT = "text,label\nmy invoice,billing\nit is broken,technical\nanother invoice,Billing\n"
TWO = [("my invoice", 0), ("it is broken", 1), ("another invoice", 0)]


def write(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content, encoding="utf-8")
    return folder / name


def test_a_drafted_task_reads_the_file_it_was_drafted_from(tmp_path: Path) -> None:
    data = write(tmp_path, "Support Tickets.csv", SUPPORT)
    draft = draft_task(data)
    task = load_task(write(tmp_path, "t.toml", task_toml(draft.task)))
    assert task == draft.task
    assert (task.name, task.labels, draft.counts) == ("support-tickets", ("billing", "technical"), (2, 1))
    assert [template.label_words for template in task.templates] == [(" billing", " technical")] * 2
    assert len({template.pattern for template in task.templates}) == 2
    assert read_task_rows(task, data) == TWO


@pytest.mark.parametrize(
    ("name", "content", "columns"),
    [
        ("a.csv", "Text;Label\nx y;a\nz;b\n", ("Text", "Label")),
        ("a.csv", "id,body,category\n1,x y,a\n2,z,b\n", ("body", "category")),
        ("a.csv", "utterance,intent\nx y,a\nz,b\n", ("utterance", "intent")),
        ("a.csv", "text,dept\nx y,a\nz,b\n", ("text", "dept")),
        ("a.tsv", "label\tsentence\na\tx y\nb\tz\n", ("sentence", "label")),
        ("a.csv", "id,note,who\n1,x y z,a\n2,x z,b\n3,y z,a\n4,y y,b\n", ("note", "who")),
        ("a.jsonl", '{"review": "x y", "stars": 1}\n{"review": "z", "stars": 2}\n', ("review", "stars")),
        ("a.json", '[{"title": "x y", "tag": "a"}, {"title": "z", "tag": "b"}]', ("title", "tag")),
    ],
)
def test_the_columns_are_found_by_name_or_by_content(tmp_path: Path, name: str, content: str, columns: Any) -> None:
    task = draft_task(write(tmp_path, name, content)).task
    assert (task.text_columns[0], task.label_column) == columns


def test_columns_may_be_given(tmp_path: Path) -> None:
    data = write(tmp_path, "a.csv", "title,text,label,topic\nt1,b1,x,a\nt2,b2,x,b\nt3,b3,x,b\n")
    draft = draft_task(data, "mine", "title", "topic")
    assert (draft.task.name, draft.task.text_columns, draft.task.label_column) == ("mine", ("title",), "topic")
    assert draft.counts == (1, 2)


def test_labels_are_in_an_order_that_does_not_depend_on_the_rows(tmp_path: Path) -> None:
    one = draft_task(write(tmp_path, "a.csv", "text,label\nx,beta\ny,Alpha\nz,gamma\n")).task
    other = draft_task(write(tmp_path, "a.csv", "text,label\nz,gamma\nx,beta\ny,Alpha\n")).task
    assert one.identity == other.identity
    assert one.labels == ("Alpha", "beta", "gamma")
    numbers = draft_task(write(tmp_path, "a.csv", "text,label\nx,10\ny,9\nz,2\n"))
    assert numbers.task.labels == ("2", "9", "10")
    assert "labels are numbers" in task_toml(numbers.task)
    assert "labels are numbers" not in task_toml(one)


def test_a_label_is_called_as_it_is_written_most_often(tmp_path: Path) -> None:
    data = write(tmp_path, "a.csv", "text,label\na,Bug\nb,bug\nc,bug\nd,Idea\n")
    assert draft_task(data) == (draft_task(data).task, (3, 1))
    assert draft_task(data).task.labels == ("bug", "Idea")


def test_names_of_programs_become_words_where_these_stay_distinct(tmp_path: Path) -> None:
    words = draft_task(write(tmp_path, "a.csv", "text,label\na,credit_card\nb,lost-parcel\n")).task.templates[0]
    assert words.label_words == (" credit card", " lost parcel")
    alike = draft_task(write(tmp_path, "a.csv", "text,label\na,credit_card\nb,credit-card\n")).task.templates[0]
    assert alike.label_words == (" credit-card", " credit_card")


REFUSED = {
    "one label": ("text,label\na,x\nb,x\n", "a.csv: ", "label_column"),
    "as many labels as rows": ("text,label\n" + "".join(f"t,l{i}\n" for i in range(200)), "200 ", "label_column"),
    "long labels": (f"text,label\na,{'x' * 70}\nb,y\n", "a.csv: ", "label_column"),
    "a missing label": ("text,label\na,x\nb,\n", "a.csv:3: ", "label"),
    "a missing text": ("text,label\na,x\n ,y\n", "a.csv:3: ", "text"),
    "no header": ("a good one,yes\na bad one,no\nso good,yes\nso bad,no\n", "a.csv:1: ", ""),
    "no header, many rows": ("a good one,yes\n" * 9 + "bad,no\n" * 9, "a.csv:1: ", ""),
    "unclear columns": ("p,q,r\nx y z,a,c\nx z,b,d\ny z,a,c\ny y,b,d\n", "--label-column", "label_column"),
    "one column": ("text\na\nb\n", "a.csv:1: ", ""),
    "half a character": ('{"text": "a", "label": "x"}\n{"text": "b", "label": "\\ud83d"}\n', "a.jsonl:2: ", "label"),
    "no rows": ("text,label\n", "a.csv ", ""),
    "an empty file": ("", "a.csv ", ""),
}


@pytest.mark.parametrize("form", REFUSED)
def test_a_file_that_gives_no_task_is_refused(tmp_path: Path, form: str) -> None:
    content, where, field = REFUSED[form]
    with raises(DataError, field=field) as caught:
        draft_task(write(tmp_path, "a.jsonl" if content.startswith("{") else "a.csv", content))
    assert where in str(caught.value)
    assert "good" not in str(caught.value)


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)


@given(labels=st.lists(names, min_size=2, max_size=4, unique=True), name=names, column=names)
def test_any_names_survive_the_file(tmp_path_factory: Any, labels: list[str], name: str, column: str) -> None:
    template = Template(pattern=f"{{text}}\n{name}?", label_words=tuple(f" {label}" for label in labels))
    task = Task(name=name, labels=tuple(labels), templates=(template,), text_columns=(column,), label_column=column)
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(task_toml(task), encoding="utf-8", newline="\n")
    assert load_task(path) == task


def test_the_cost_of_the_words_is_a_comment_in_the_file() -> None:
    task = draft_of("cat", "dog")
    text = task_toml(task, word_costs(ToyScorer(), task), "toy")
    assert len(re.findall(r"# .* toy: 4, 4; .* 7 tokens", text)) == 2
    merging = draft_of("cat", "cats")
    text = task_toml(merging, word_costs(ToyScorer(), merging), "toy")
    assert len(re.findall("# .* toy: .*' cat' and ' cats'", text)) == 2
    assert "tokens of" not in task_toml(task)


def draft_of(*labels: str) -> Task:
    words = tuple(f" {label}" for label in labels)
    patterns = ("{text}\nIs (", "{text}\nOr (")
    return Task(name="t", labels=labels, templates=tuple(Template(pattern=p, label_words=words) for p in patterns))


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDBPT_CACHE", str(tmp_path / "cache"))  # no model was pulled
    write(tmp_path, "support.csv", SUPPORT)
    return tmp_path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["tasks", "new", *arguments])
    return int(ended.value.code or 0)


def test_the_command_writes_a_file_that_serves_as_task(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("support.csv") == 0
    said = capsys.readouterr().out
    assert "support.toml" in said
    assert "billing 2, technical 1" in said
    assert "--model" in said
    assert tasks.to_rows("support.csv", tasks.load(folder / "support.toml")) == TWO


def test_it_replaces_nothing_unless_forced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "support.toml").write_text("mine")
    assert run("support.csv") == ConfigError.exit_code
    assert (folder / "support.toml").read_text() == "mine"
    assert "--force" in capsys.readouterr().err
    assert run("support.csv", "--quiet", "--force") == 0
    assert capsys.readouterr().out == "support.toml\n"
    assert load_task(folder / "support.toml").labels == ("billing", "technical")


def test_with_a_model_it_counts_the_tokens(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks_command, "load_model", lambda _name: ToyScorer())
    assert run("support.csv", "--model", "toy", "--out", "sub/t.toml", "--name", "desk", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["path"], found["name"], found["labels"]) == ("sub/t.toml", "desk", {"billing": 2, "technical": 1})
    assert [template["tokens"] for template in found["templates"]] == [[8, 10]] * 2
    assert "tokens of the words with toy: 8, 10" in (folder / "sub" / "t.toml").read_text()
    assert run("support.csv", "--model", "toy", "--force") == 0
    assert "17 tokens" in capsys.readouterr().out
