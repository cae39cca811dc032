"""`sample_targets`: which of several answers to a text is kept."""

from __future__ import annotations

import pytest

import fedbpt
from fedbpt import target_sampling
from fedbpt.tasks import Generation, Task, Template
from tests.support.toy_scorer import ToyScorer

TASK = Task(
    name="replies",
    templates=(Template(pattern="{text}\nA:", label_words=()),),
    generation=Generation(metric="max-words:3", max_tokens=4),
)


def test_an_answer_that_ends_within_a_character_is_no_target(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = iter([["caf\ufffd", "b"], ["c", "d\ufffd"]])
    monkeypatch.setattr(target_sampling, "answer_texts", lambda *_: next(passes))
    found = fedbpt.sample_targets(ToyScorer(), TASK, ["a", "b"], [("x", "y")], metric=lambda *_: 1.0, n_samples=2)
    assert found.rows == (("a", "c"), ("b", "b"))


def test_an_answer_that_the_metric_fails_on_is_worth_less_than_any(monkeypatch: pytest.MonkeyPatch) -> None:
    def negative(_text: str, answer: str, _row: object) -> float:
        return 1 / 0 if answer == "fail" else -0.3

    passes = iter([["fail", "fail"], ["fine", "fail"]])
    monkeypatch.setattr(target_sampling, "answer_texts", lambda *_: next(passes))
    found = fedbpt.sample_targets(ToyScorer(), TASK, ["a", "b"], [("x", "y")], metric=negative, n_samples=2, least=-1.0)
    assert found.rows == (("a", "fine"),)


def test_an_empty_answer_is_never_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = iter([["", "long " * 9, ""], ["ok", "", ""], ["fine", "short", ""]])
    monkeypatch.setattr(target_sampling, "answer_texts", lambda *_: next(passes))
    found = fedbpt.sample_targets(
        ToyScorer(), TASK, ["a", "b", "c"], [("x", "y")], metric=lambda *_: 1.0, n_samples=3, least=1.0
    )
    assert found.rows == (("a", "ok"), ("b", "long " * 9))  # the first of equals, but for empty ones
