"""Answers beside what a person would try first: failures, what no model could say, examples that do not fit."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

import fedbpt
from fedbpt import answering
from fedbpt.answering import best_constant
from fedbpt.device.device import Device
from fedbpt.errors import ConfigError, InputError
from fedbpt.metrics import metric_named
from fedbpt.objective.answers import AnswerObjective
from fedbpt.protocol.specs import ObjectiveSpec, PromptSpec
from fedbpt.tasks import Generation, Task, Template
from fedbpt.tasks.rows import spread
from tests.support.raises import raises
from tests.support.toy_scorer import ToyScorer

ROWS = [(f"text {i}", "x" * (1 + i % 3)) for i in range(20)]
TASK = Task(
    name="replies",
    templates=(Template(pattern="{text}\nA:", label_words=()),),
    generation=Generation(metric="contains", max_tokens=4),
)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What each line answers to every text, by the number of its example rows: -1 is the tuned prompt."""
    answers = {"tuned": "fail", "zero_shot": "xxxxx", "examples": "xxxx"}

    def answer(*args: Any) -> list[str]:
        _, _, rows, prompt, _, *shown = args
        name = "tuned" if prompt is not None else "examples" if shown else "zero_shot"
        return [answers[name]] * len(rows)

    monkeypatch.setattr(answering, "answer_texts", answer)
    return answers


def prompt() -> fedbpt.Prompt:
    scorer = ToyScorer()
    return fedbpt.Prompt(
        rows=scorer.token_embeddings([7]),
        spec=PromptSpec(d=4),
        task_name=TASK.name,
        labels=(),
        template=TASK.templates[0],
        model_fingerprint=scorer.fingerprint,
        model_name=scorer.name,
        architecture="toy",
        task=TASK,
    )


def far_from_three(_text: str, answer: str, _row: object) -> float:
    if answer == "fail":
        raise ValueError("secret")
    return -abs(len(answer) - 3.0)


def test_a_metric_that_fails_on_all_answers_shows_no_improvement(said: dict[str, str]) -> None:
    """Where values are negative, a failure that counted 0 would be the best of all."""
    found = fedbpt.compare_answers(ToyScorer(), TASK, ROWS, prompt(), ROWS, metric=far_from_three)
    assert found.lines["tuned"].n_failed == len(ROWS)
    assert found.lines["tuned"].mean == found.lines["zero_shot"].mean == -2.0
    assert not found.improved
    assert "failed on all" in found.verdict()
    said["tuned"] = "xxx"
    assert (
        fedbpt.compare_answers(ToyScorer(), TASK, ROWS, prompt(), ROWS, metric=far_from_three).lines["tuned"].mean
        == 0.0
    )


def test_a_constant_answer_ends_where_a_models_would() -> None:
    rows = [("t", "a\nb"), ("t", "a\nb"), ("t", "c")]
    exact = metric_named("exact-match")
    assert best_constant(exact, rows) == "a\nb"
    assert best_constant(exact, rows, ["\n"]) == "c"
    assert best_constant(exact, [("t", "\nb")], ["\n"]) in ("", "b")


@pytest.mark.usefixtures("said")
def test_a_verdict_says_where_no_example_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "fitting_examples", lambda *_: [])
    found = fedbpt.compare_answers(
        ToyScorer(), TASK, ROWS, prompt(), ROWS, metric=lambda _t, answer, _r: answer == "fail"
    )
    assert "no example fits" in found.verdict()
    found = fedbpt.compare_answers(ToyScorer(), TASK, ROWS, prompt(), metric=lambda _t, answer, _r: answer == "fail")
    assert "give training rows" in found.verdict()


def test_answers_keep_no_kv(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    scorer = ToyScorer()
    compiled = scorer.compile
    monkeypatch.setattr(scorer, "compile", lambda *a, **b: kept.append(b["keep_kv"]) or compiled(*a, **b))
    fedbpt.answers(scorer, TASK, ROWS[:2])
    assert kept == [False]


def test_values_outside_0_to_1_fail_in_a_run() -> None:
    values = iter([100.0, -0.5, 0.25, 1.0])
    answering = AnswerObjective(
        ToyScorer(), TASK.templates[0], ROWS[:4], 16, PromptSpec(d=4), Generation(), lambda *_: next(values)
    )
    found = answering.measure(ToyScorer().token_embeddings([7])[None])
    np.testing.assert_array_equal(found.rewards, [[0.0, 0.0, 0.25, 1.0]])
    assert found.n_failed.tolist() == [2]


def test_texts_are_sampled_for_metrics_that_judge_an_answer_alone() -> None:
    for metric in (None, "rouge-l"):
        with raises(ConfigError, field="metric") as caught:
            fedbpt.sample_targets(ToyScorer(), TASK, ["a"], ROWS[:2], metric=metric)
        assert "max-words" in str(caught.value)


def test_rows_are_spread_over_a_sorted_file() -> None:
    assert spread(3, 5).tolist() == [0, 1, 2]
    assert spread(10, 3).tolist() == [0, 3, 6]
    assert len(set(spread(1000, 32).tolist())) == 32


def test_targets_that_no_answer_can_equal_are_counted_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    rows = [("a", "one\ntwo"), ("b", "long " * 9), ("c", "no")]
    device = Device("a", ToyScorer(), rows, task=TASK)
    device._warn_of_unreachable(TASK.generation, TASK.templates[0])  # type: ignore[arg-type]
    assert "1 of 3 target texts contain one of its stop strings" in caplog.text
    assert "2 of 3 target texts are longer than 4 tokens" in caplog.text
    assert "two" not in caplog.text.replace("no answer", "")


def test_a_text_that_leaves_no_room_for_an_answer_is_refused_before_the_search() -> None:
    scorer = ToyScorer()
    rows = [("x" * 4000, "y")]
    room = scorer.n_ctx_train - len("\nA:") - 1
    likelihood = ObjectiveSpec(loss="nll", max_text_tokens=room - 12)
    device = Device("a", scorer, rows, task=TASK)
    device.check_fit(likelihood, PromptSpec(d=4))
    device.check_fit(msgspec.structs.replace(likelihood, generation=Generation(max_tokens=8)), PromptSpec(d=4))
    with raises(InputError, field="max_text_tokens", limit=scorer.n_ctx_train):
        device.check_fit(msgspec.structs.replace(likelihood, generation=Generation(max_tokens=32)), PromptSpec(d=4))
