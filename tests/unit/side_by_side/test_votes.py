"""`Votes`: rows that a person chose are whole lines of a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedbpt.errors import ConfigError, InputError
from fedbpt.side_by_side.votes import Votes
from fedbpt.tasks import read_task_rows
from tests.support.raises import raises
from tests.support.toy_task import TASK


def test_a_vote_never_joins_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "votes" / "mine.jsonl"
    votes = Votes(path, TASK)
    votes.add("é one", TASK.labels[0])
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    votes.add("two", TASK.labels[1])
    votes.add("three", TASK.labels[1])
    assert read_task_rows(TASK, path) == [("é one", 0), ("two", 1), ("three", 1)]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3


def test_half_a_character_is_refused_and_the_file_stays(tmp_path: Path) -> None:
    votes = Votes(tmp_path / "votes.jsonl", None)
    votes.add("text", "answer")
    for text, answer in (("\ud83d", "answer"), ("text", "\ud83d")):
        with raises(InputError, field="the text" if answer == "answer" else "the answer"):
            votes.add(text, answer)
    assert [json.loads(line) for line in votes.path.read_text().splitlines()] == [{"text": "text", "label": "answer"}]


@pytest.mark.parametrize("name", ["votes.csv", "votes"])
def test_another_kind_of_file_is_refused(name: str) -> None:
    with raises(ConfigError, field="--votes"):
        Votes(Path(name), None)
