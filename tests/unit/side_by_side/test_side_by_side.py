"""The original and the tuned model side by side, with the toy model: probabilities are those of `fedbpt.evaluate`."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest

from fedbpt import Budget, Prompt, PromptSpec, TuneResult, evaluate, tune
from fedbpt.engine.text_generator import Sampling
from fedbpt.engine.text_stream import Generation, place
from fedbpt.errors import ConfigError, InputError, PromptError
from fedbpt.side_by_side.sides import SideBySide
from fedbpt.tasks import Task
from fedbpt.tasks.task import render_ids
from tests.support.raises import raises
from tests.support.toy_generator import PLACES
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows
from tests.unit.engine.test_text_stream import TASK as MANNER
from tests.unit.engine.test_text_stream import rows as manner_rows

BUDGET = Budget(evaluations=8 * 6)


@pytest.fixture(scope="module", params=["front", "cue"])
def moods(request: pytest.FixtureRequest) -> Prompt:
    """A prompt with a readout over two templates."""
    spec = PromptSpec(d=6, alpha=2.0, placement=request.param)
    return tune(ToyScorer(), TASK, rows(40), budget=BUDGET, prompt=spec, popsize=8).prompt


@pytest.fixture(scope="module")
def manner() -> TuneResult:
    spec = PromptSpec(d=6, alpha=2.0)
    return tune(ToyScorer(), MANNER, manner_rows(12), budget=BUDGET, prompt=spec, popsize=8)


def test_the_probabilities_are_those_of_evaluate(moods: Prompt) -> None:
    assert len(moods.word_ids)
    assert moods.others
    pair = SideBySide(ToyScorer(), moods, TASK)
    for text, label in rows(6, 100):
        found = pair.classify(text)
        for values, prompt in ((found.original, None), (found.tuned, moods)):
            judged = evaluate(ToyScorer(), TASK, [(text, label)], prompt, template=moods.template)
            assert sum(values) == pytest.approx(1)
            assert int(np.argmax(values)) == judged.predictions[0]
            assert -np.log(values[label]) == pytest.approx(judged.loss, rel=1e-6)


def test_texts_are_truncated_as_in_the_task(moods: Prompt) -> None:
    short = Task(name=TASK.name, labels=TASK.labels, templates=TASK.templates, max_text_tokens=4)
    pair, long = SideBySide(ToyScorer(), moods, short), "aaa and what is not read"
    assert pair.classify(long) == pair.classify("aaa and")
    assert SideBySide(ToyScorer(), moods).classify(long) != SideBySide(ToyScorer(), moods).classify("aaa and")


def test_both_sides_are_generated_in_turn(manner: TuneResult) -> None:
    scorer, prompt = ToyScorer(), manner.prompt
    pair = SideBySide(scorer, prompt, MANNER)
    assert not pair.classifies
    found = list(pair.generate("question 3", max_tokens=4))
    assert {side for side, _ in found[:3]} == {"original", "tuned"}  # neither waits for the other
    for side, rows_of in (("original", None), ("tuned", prompt.rows)):
        placed = place(scorer, prompt.template, "question 3", None, rows_of, prompt.spec.placement)
        expected = "".join(piece.text for piece in Generation(scorer.generator, placed, max_tokens=4))
        assert "".join(piece for of, piece in found if of == side) == expected


def test_settings_reach_both_sides(manner: TuneResult) -> None:
    pair = SideBySide(ToyScorer(), manner.prompt)
    how = Sampling(temperature=5.0, seed=1)
    first, again = (list(pair.generate("x", how, 6)) for _ in range(2))
    assert first == again != list(pair.generate("x", Sampling(), 6))


def test_an_empty_text_is_rejected(moods: Prompt, manner: TuneResult) -> None:
    with pytest.raises(InputError, match="empty"):
        SideBySide(ToyScorer(), moods).classify(" \n")
    with pytest.raises(InputError, match="empty"):
        SideBySide(ToyScorer(), manner.prompt).generate("")


def test_another_model_or_task_is_rejected(moods: Prompt) -> None:
    with raises(PromptError):
        SideBySide(ToyScorer(seed=9), moods)
    with raises(ConfigError, field="task"):
        SideBySide(ToyScorer(), moods, MANNER)


def test_closing_early_frees_both_generators(manner: TuneResult) -> None:
    scorer = ToyScorer()
    pair = SideBySide(scorer, manner.prompt, MANNER)
    with closing(pair.generate("question 3")) as pieces:
        next(pieces)
        assert scorer.generator.n_open == 2
    assert scorer.generator.n_open == 0
    assert list(pieces) == []
    held = [pair.generation(f"question {i}", "tuned") for i in range(PLACES - 1)]
    with pytest.raises(InputError):
        pair.generate("question 4")  # there is a place for one side alone
    assert scorer.generator.n_open == len(held)


def test_the_tokens_a_classifier_reads_are_counted_after_truncation(moods: Prompt) -> None:
    templates = (moods.template, *moods.others)
    for limit, text in ((None, "aaa number 1"), (4, "aaa number 1"), (4, "aaa number 1" * 50)):
        pair = SideBySide(ToyScorer(), moods, TASK, max_text_tokens=limit)
        texts = [render_ids(ToyScorer(), template, text, limit or TASK.max_text_tokens) for template in templates]
        in_front = moods.n_prompt if moods.spec.placement == "front" else 0
        assert pair.n_read(text) == in_front + sum(map(len, texts))
