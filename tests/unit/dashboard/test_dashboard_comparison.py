"""`Comparison` and `Examples`: the replies on the compare page."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedbpt import Budget, PromptSpec, TuneResult, evaluate, tune
from fedbpt.api import make_prompt
from fedbpt.coordinator.clients import HttpClient
from fedbpt.dashboard import comparison as comparison_module
from fedbpt.dashboard.comparison import Comparison, models_of_run, questions_of
from fedbpt.dashboard.examples import KINDS, Examples, Row, Verdict
from fedbpt.device.agent import AgentService
from fedbpt.device.agent.server import AgentServer
from fedbpt.device.device import Device
from fedbpt.errors import FedbptError, InputError, ModelNotFoundError
from fedbpt.protocol.questions import DEFAULT_TOKENS, Answer
from fedbpt.runs.result import RunResult, Shipped
from fedbpt.side_by_side.sides import Probabilities, Side, SideBySide
from fedbpt.tasks import Task, write_rows
from tests.support.prompt_kinds import shipping
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows
from tests.unit.engine.test_text_stream import TASK as MANNER
from tests.unit.engine.test_text_stream import rows as manner_rows

SPEC = PromptSpec(d=6, alpha=2.0)


@pytest.fixture(scope="module")
def moods() -> TuneResult:
    return tune(ToyScorer(), TASK, rows(20), budget=Budget(evaluations=16), prompt=SPEC, popsize=8)


@pytest.fixture(scope="module")
def manner() -> TuneResult:
    return tune(ToyScorer(), MANNER, manner_rows(8), budget=Budget(evaluations=16), prompt=SPEC, popsize=8)


@pytest.fixture
def comparison(moods: TuneResult) -> Iterator[Comparison]:
    made = Comparison(lambda: models_of_run(ToyScorer(), TASK, moods.run), TASK.labels)
    yield made
    asyncio.run(made.aclose())


def test_replies_are_those_of_the_runs_prompt(moods: TuneResult, comparison: Comparison) -> None:
    expected = SideBySide(ToyScorer(), moods.prompt, TASK).classify("aaa")
    assert asyncio.run(comparison.classify("aaa")) == expected


@pytest.mark.parametrize("shipped", ["calibrated", "probe", "prompt", "read"])
def test_the_page_answers_with_whatever_line_the_run_ships(moods: TuneResult, shipped: Shipped) -> None:
    run = shipping(moods.run, shipped)
    made = Comparison(lambda: models_of_run(ToyScorer(), TASK, run), TASK.labels)
    found = asyncio.run(made.classify("aaa"))
    asyncio.run(made.aclose())
    judged = evaluate(ToyScorer(), TASK, [("aaa", 0)], make_prompt(ToyScorer(), TASK, run))
    assert -math.log(found.tuned[0]) == pytest.approx(judged.loss, rel=1e-6)


def test_the_model_is_loaded_once_and_in_another_thread(moods: TuneResult) -> None:
    loaded: list[str] = []

    def make() -> SideBySide:
        loaded.append(threading.current_thread().name)
        return models_of_run(ToyScorer(), TASK, moods.run)

    comparison = Comparison(make, TASK.labels)
    assert loaded == []

    async def both() -> None:
        await asyncio.gather(comparison.classify("aaa"), comparison.classify("zzz"))

    asyncio.run(both())
    asyncio.run(comparison.aclose())
    assert [name.startswith("fedbpt-compare") for name in loaded] == [True]


def test_texts_of_both_sides_come_in_pieces(manner: TuneResult) -> None:
    comparison = Comparison(lambda: models_of_run(ToyScorer(), MANNER, manner.run), ())

    async def said() -> dict[Side, str]:
        texts: dict[Side, str] = {"original": "", "tuned": ""}
        async for side, piece in comparison.generate("question 3"):
            texts[side] += piece
        return texts

    found = asyncio.run(said())
    asyncio.run(comparison.aclose())
    pair = SideBySide(ToyScorer(), manner.prompt, MANNER)
    expected: dict[Side, str] = {"original": "", "tuned": ""}
    for side, piece in pair.generate("question 3", max_tokens=DEFAULT_TOKENS):
        expected[side] += piece
    assert found == expected


def test_an_error_does_not_affect_the_next_question(comparison: Comparison) -> None:
    with pytest.raises(InputError):
        asyncio.run(comparison.classify("  "))
    assert sum(asyncio.run(comparison.classify("aaa")).tuned) == pytest.approx(1)

    def absent() -> SideBySide:
        raise ModelNotFoundError("pull it first")

    without = Comparison(absent, TASK.labels)
    with pytest.raises(ModelNotFoundError, match="pull it first"):
        asyncio.run(without.classify("aaa"))
    asyncio.run(without.aclose())


def test_a_device_gives_the_same_replies_as_this_machine(moods: TuneResult, manner: TuneResult) -> None:
    async def ask(server: AgentServer, task: Task, run: RunResult, text: str) -> tuple[Answer, list[Answer]]:
        made = Comparison(
            lambda: models_of_run(ToyScorer(), task, run), task.labels, devices=[HttpClient(server.url, "pi5")]
        )
        heard: list[Answer] = []
        with pytest.raises(InputError, match="empty"):
            await made.ask_device("pi5", " ", heard.append)
        answer = await made.ask_device("pi5", text, heard.append)
        await made.aclose()
        return answer, heard

    with AgentServer(AgentService(Device("pi5", ToyScorer(), rows(4), task=TASK))) as server:
        found, _ = asyncio.run(ask(server, TASK, moods.run, "aaa"))
        said, _ = asyncio.run(ask(server, MANNER, manner.run, "question 3"))
    assert found.probabilities == tuple(SideBySide(ToyScorer(), moods.prompt, TASK).classify("aaa"))
    expected = {"original": "", "tuned": ""}
    for side, piece in SideBySide(ToyScorer(), manner.prompt, MANNER).generate("question 3", max_tokens=64):
        expected[side] += piece
    assert said.texts == (expected["original"], expected["tuned"])


def test_too_many_questions_are_rejected(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison_module, "MAX_WAITING", 2)

    async def crowd() -> list[object]:
        return await asyncio.gather(*(comparison.classify("aaa") for _ in range(3)), return_exceptions=True)

    kinds = [isinstance(answer, FedbptError) for answer in asyncio.run(crowd())]
    assert kinds == [False, False, True]
    asyncio.run(comparison.classify("aaa"))  # there is room again


def test_questions_are_a_fixed_choice_of_held_out_rows(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    write_rows(path, rows(30), TASK.labels)
    found = questions_of(TASK, path, 4)
    assert len(set(found)) == 4
    assert found == questions_of(TASK, path, 4)
    assert set(found) <= {Row(text, TASK.labels[label]) for text, label in rows(30)}


# --- examples --------------------------------------------------------------------------------------------------------

SAID = {"a": ("x", "x"), "b": ("y", "x"), "c": ("x", "y"), "d": ("y", "y"), "e": ("y", "x")}
"""Predictions of the original and the tuned model; the correct label is always x."""


def looked_up(*texts: str) -> Examples:
    def classify(text: str) -> Probabilities:
        original, tuned = (((0.9, 0.1) if said == "x" else (0.1, 0.9)) for said in SAID[text])
        return Probabilities(original, tuned)

    return Examples([Row(text, "x") for text in texts], ("x", "y"), classify)


def test_examples_are_of_every_kind_and_all_rows_are_counted() -> None:
    examples = looked_up(*"abcde")
    assert (examples.counts(), examples.done) == ({}, False)
    while examples.classify_next():
        pass
    assert examples.done
    assert [verdict.kind for verdict in examples.verdicts] == ["both", "gained", "lost", "neither", "gained"]
    assert dict(examples.counts()) == {"both": 1, "gained": 2, "lost": 1, "neither": 1}
    assert set(KINDS) == set(examples.counts())
    assert examples.n_differ() == 3


def test_finding_examples_classifies_no_more_rows_than_needed() -> None:
    examples = looked_up(*"abcde")
    found = examples.find("gained")
    assert next(found) == Verdict(Row("b", "x"), "y", "x")
    assert len(examples.verdicts) == 2
    assert [verdict.row.text for verdict in found] == ["e"]
    assert list(examples.find("lost")) == [Verdict(Row("c", "x"), "x", "y")]


def test_examples_match_replies_and_questions_come_in_between(moods: TuneResult) -> None:
    questions = [Row(text, TASK.labels[label]) for text, label in rows(30, first=200)]
    comparison = Comparison(lambda: models_of_run(ToyScorer(), TASK, moods.run), TASK.labels, questions)
    comparison.start_examples()
    comparison.start_examples()  # twice is once
    answer = asyncio.run(comparison.classify("aaa"))
    assert answer == SideBySide(ToyScorer(), moods.prompt, TASK).classify("aaa")
    deadline = time.monotonic() + 60
    while not comparison.examples.done and time.monotonic() < deadline:
        time.sleep(0.01)
    asyncio.run(comparison.aclose())
    verdicts = comparison.examples.verdicts
    assert [verdict.row for verdict in verdicts] == questions
    for verdict, (text, _) in zip(verdicts, rows(30, first=200), strict=True):
        original, tuned = SideBySide(ToyScorer(), moods.prompt, TASK).classify(text)
        labels = [TASK.labels[side.index(max(side))] for side in (original, tuned)]
        assert [verdict.original, verdict.tuned] == labels


def test_without_the_model_examples_end_with_one_line() -> None:
    def absent() -> SideBySide:
        raise ModelNotFoundError("pull it first")

    comparison = Comparison(absent, TASK.labels, [Row("aaa", "positive")])
    comparison.start_examples()
    deadline = time.monotonic() + 60
    while not comparison.error and time.monotonic() < deadline:
        time.sleep(0.01)
    asyncio.run(comparison.aclose())
    assert comparison.error == "pull it first"


def test_there_are_no_examples_if_texts_are_generated() -> None:
    comparison = Comparison(lambda: pytest.fail("no model is wanted"), (), [Row("aaa", "a reply")])
    comparison.start_examples()
    asyncio.run(comparison.aclose())
    assert (comparison.examples.n_rows, comparison.error) == (0, "")
