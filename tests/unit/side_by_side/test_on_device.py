"""A device's replies to questions, with the toy model: the same as those of `SideBySide`."""

from __future__ import annotations

import asyncio

import pytest

from fedbpt import Budget, Prompt, PromptSpec, tune
from fedbpt.coordinator.clients import InProcessClient
from fedbpt.device.device import Device
from fedbpt.errors import DeviceFailedError, PromptError, ScoringInterrupted
from fedbpt.protocol.questions import Answer, Question
from fedbpt.side_by_side.sides import SideBySide
from tests.support.toy_generator import PLACES
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows
from tests.unit.engine.test_text_stream import TASK as MANNER
from tests.unit.engine.test_text_stream import rows as manner_rows

SPEC = PromptSpec(d=4, alpha=2.0)
BUDGET = Budget(evaluations=24)


@pytest.fixture(scope="module")
def mood() -> Prompt:
    return tune(ToyScorer(), TASK, rows(16), budget=BUDGET, prompt=SPEC).prompt


@pytest.fixture(scope="module")
def manner() -> Prompt:
    return tune(ToyScorer(), MANNER, manner_rows(8), budget=BUDGET, prompt=SPEC).prompt


def device() -> Device:
    return Device("a", ToyScorer(), rows(4), task=TASK)


def question(prompt: Prompt, text: str = "aaa number 1", **changes: object) -> Question:
    return Question(model_fingerprint=ToyScorer().fingerprint, prompt=prompt.to_bytes(), text=text, **changes)


def ask(asked: Question, so_far: list[Answer] | None = None) -> Answer:
    return device().answer(asked, (so_far if so_far is not None else []).append, lambda: False)


def test_a_prompt_that_classifies_gives_both_sides_probabilities(mood: Prompt) -> None:
    found = ask(question(mood, max_text_tokens=TASK.max_text_tokens))
    assert found == Answer(probabilities=tuple(SideBySide(ToyScorer(), mood, TASK).classify("aaa number 1")), done=True)
    short = ask(question(mood, "aaa number 1", max_text_tokens=3))
    assert short == ask(question(mood, "aaa", max_text_tokens=3)) != found


def test_a_prompt_that_generates_gives_both_sides_texts_as_they_come(manner: Prompt) -> None:
    so_far: list[Answer] = []
    found = ask(question(manner, max_tokens=6, temperature=1.0, seed=2, stop=("q",)), so_far)
    assert found.done
    assert [answer.n for answer in so_far] == list(range(1, found.n + 1))
    assert so_far[-1].texts == found.texts
    assert found == ask(question(manner, max_tokens=6, temperature=1.0, seed=2, stop=("q",)))
    expected = {"original": "", "tuned": ""}
    for side, piece in SideBySide(ToyScorer(), manner).generate("aaa number 1", max_tokens=6):
        expected[side] += piece
    assert ask(question(manner, max_tokens=6)).texts == tuple(expected.values())


def test_a_reply_can_be_cancelled(manner: Prompt) -> None:
    said: list[Answer] = []
    scorer = ToyScorer()
    answering = Device("a", scorer, rows(4), task=TASK)
    for _ in range(PLACES):
        said.clear()
        with pytest.raises(ScoringInterrupted):
            answering.answer(question(manner), said.append, lambda: len(said) == 2)
        assert len(said) == 2
        assert scorer.generator.n_open == 0


def test_a_damaged_prompt_or_one_for_another_model_is_refused(mood: Prompt) -> None:
    asked = question(mood)
    with pytest.raises(PromptError, match="the question's prompt"):
        ask(Question(model_fingerprint=asked.model_fingerprint, prompt=asked.prompt[:-5], text="x"))
    other = Device("b", ToyScorer(seed=7), rows(4), task=TASK)
    with pytest.raises(PromptError, match="toy"):
        other.answer(asked, lambda _answer: None, lambda: False)


def test_a_client_gets_replies_of_a_real_device(mood: Prompt) -> None:
    async def scene() -> None:
        client = InProcessClient(device())
        assert (await client.ask(question(mood))).done
        with pytest.raises(DeviceFailedError, match="empty"):
            await client.ask(question(mood, " "))
        await client.aclose()

    asyncio.run(scene())
