"""The original and the tuned model side by side, with the toy model: probabilities are those of `fedbpt.evaluate`."""

from __future__ import annotations

from contextlib import closing

import msgspec
import numpy as np
import pytest

from fedbpt import Budget, Prompt, PromptSpec, TuneResult, evaluate, tune
from fedbpt.api import make_prompt
from fedbpt.engine.text_generator import Sampling
from fedbpt.engine.text_stream import Generation, place
from fedbpt.errors import ConfigError, InputError, PromptError
from fedbpt.objective.layer_view import LayerReader
from fedbpt.protocol.specs import Array, LayerReadout, PromptPlace
from fedbpt.protocol.specs import Generation as Answering
from fedbpt.runs.result import Shipped
from fedbpt.side_by_side.sides import SIDES, SideBySide
from fedbpt.tasks import Task
from fedbpt.tasks.task import cue_ids, render_ids
from tests.support.prompt_kinds import KINDS, prompt_of_kind, shipping
from tests.support.raises import raises
from tests.support.toy_generator import PLACES
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows
from tests.unit.engine.test_text_stream import TASK as MANNER
from tests.unit.engine.test_text_stream import rows as manner_rows
from tests.unit.prompts.test_prompt import make

BUDGET = Budget(evaluations=8 * 6)
PLACEMENTS: tuple[PromptPlace, ...] = ("front", "cue")


@pytest.fixture(scope="module", params=[(kind, place) for kind in KINDS for place in PLACEMENTS], ids="-".join)
def moods(request: pytest.FixtureRequest) -> Prompt:
    return prompt_of_kind(*request.param)


@pytest.fixture(scope="module")
def manner() -> TuneResult:
    spec = PromptSpec(d=6, alpha=2.0)
    return tune(ToyScorer(), MANNER, manner_rows(12), budget=BUDGET, prompt=spec, popsize=8)


def test_prompts_of_all_kinds_are_compared() -> None:
    words, calibrated, probe, prompt, read = (prompt_of_kind(kind, "front") for kind in KINDS)
    assert len(words.word_ids)
    assert words.others
    assert calibrated.layer_readout is prompt.layer_readout is None
    assert probe.layer_readout is not None
    assert probe.layer_readout.others
    assert read.layer_readout is not None
    assert read.layer_readout.others
    assert [each.spec.placement for each in (calibrated, probe, prompt, read)] == ["cue", "cue", "front", "front"]


def test_the_probabilities_are_those_of_evaluate(moods: Prompt) -> None:
    pair = SideBySide(ToyScorer(), moods, TASK)
    for text, label in rows(6, 100):
        found = pair.classify(text)
        for values, prompt in ((found.original, None), (found.tuned, moods)):
            judged = evaluate(ToyScorer(), TASK, [(text, label)], prompt, template=moods.template)
            assert sum(values) == pytest.approx(1)
            assert int(np.argmax(values)) == judged.predictions[0]
            assert -np.log(values[label]) == pytest.approx(judged.loss, rel=1e-6)


def test_a_result_without_a_prompt_leaves_the_model_as_it_is() -> None:
    spec = PromptSpec(d=6, alpha=2.0, placement="front", n_prompt=2)
    run = tune(ToyScorer(), TASK, rows(40), budget=BUDGET, prompt=spec, popsize=8, show=False).run
    assert not shipping(run, "probe").latent.any()
    names: tuple[Shipped, ...] = ("probe", "calibrated")
    for name in names:
        bare = make_prompt(ToyScorer(), TASK, shipping(run, name))
        cue = cue_ids(ToyScorer(), run.template)
        assert bare.rows.tobytes() == ToyScorer().token_embeddings(cue[-1:]).tobytes()
        assert (bare.spec.placement, bare.n_prompt) == ("cue", 1)
    readout = run.layer_fits["probe"]
    bare = make_prompt(ToyScorer(), TASK, shipping(run, "probe"))
    without = LayerReader(readout, ToyScorer(), run.template, TASK.labels, TASK.max_text_tokens)
    for text, _ in rows(4, 100):
        logits = without.logits([text])[0]
        expected = np.exp(logits) / np.exp(logits).sum()
        assert SideBySide(ToyScorer(), bare).probabilities(text, "tuned") == pytest.approx(tuple(expected), abs=1e-6)
    tuned = make_prompt(ToyScorer(), TASK, shipping(run, "read"))
    assert (tuned.spec.placement, tuned.n_prompt) == ("front", 2)


def test_a_template_that_is_not_read_counts_no_tokens() -> None:
    pair = SideBySide(ToyScorer(), make_layered([1.0, 0.0]))
    own, other = (len(render_ids(ToyScorer(), each, "aaa", 128)) for each in TASK.templates)
    assert pair.n_read("aaa") == 2 + own
    assert SideBySide(ToyScorer(), make_layered([0.0, 1.0])).n_read("aaa") == other
    assert SideBySide(ToyScorer(), make_layered([1.0, 1.0])).n_read("aaa") == 2 + own + other


def make_layered(shares: list[float]) -> Prompt:
    """A prompt of two rows in front that reads the templates of `TASK` with weights times ``shares``."""
    weights = np.ones((2, 1, 8, 2)) * np.array(shares)[:, None, None, None]
    readout = LayerReadout(
        layers=(1,),
        weights=Array.of(weights, "<f2"),
        word_scales=Array.of(np.zeros(2), "<f4"),
        bias=Array.of(np.zeros(2), "<f4"),
        others=TASK.templates[1:],
    )
    return make(
        spec=PromptSpec(placement="front", n_prompt=2, d=1),
        task_name=TASK.name,
        labels=TASK.labels,
        template=TASK.templates[0],
        task=TASK,
        label_bias=None,
        layer_readout=readout,
    )


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
        placed = place(scorer, prompt.template, "question 3", None, rows_of, prompt.spec)
        expected = "".join(piece.text for piece in Generation(scorer.generator, placed, max_tokens=4))
        assert "".join(piece for of, piece in found if of == side) == expected


def test_replies_are_as_long_and_end_as_the_tasks_answers_are_measured(manner: TuneResult) -> None:
    whole = {"original": "", "tuned": ""}
    for side, piece in SideBySide(ToyScorer(), manner.prompt, MANNER).generate("question 3", max_tokens=8):
        whole[side] += piece
    assert len(whole["tuned"]) == 8
    stop = whole["tuned"][3]
    task = msgspec.structs.replace(MANNER, generation=Answering(max_tokens=6, stop=(stop,)))
    pair = SideBySide(ToyScorer(), manner.prompt, task)
    found = {side: "".join(piece.text for piece in pair.generation("question 3", side)) for side in SIDES}
    assert found == {side: text[:6].partition(stop)[0] for side, text in whole.items()}
    given = "".join(piece.text for piece in pair.generation("question 3", "tuned", None, 8, ()))
    assert given == whole["tuned"]
    by_grammar = pair.generation("question 3", "tuned", Sampling(temperature=0.0, grammar="root ::= [a-z]*"))
    assert by_grammar._text._stop == ()  # JSON may contain it
    by_grammar.close()


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
    readout = moods.layer_readout
    templates = (moods.template, *(moods.others if readout is None else readout.others))
    for limit, text in ((None, "aaa number 1"), (4, "aaa number 1"), (4, "aaa number 1" * 50)):
        pair = SideBySide(ToyScorer(), moods, TASK, max_text_tokens=limit)
        texts = [render_ids(ToyScorer(), template, text, limit or TASK.max_text_tokens) for template in templates]
        in_front = moods.n_prompt if moods.spec.placement == "front" else 0
        assert pair.n_read(text) == in_front + sum(map(len, texts))
