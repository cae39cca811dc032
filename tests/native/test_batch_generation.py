"""Many texts continued at a time, under many candidate prompts."""

from __future__ import annotations

import re
import threading
from typing import Any

import numpy as np
import pytest
from tests.support.raises import raises
from tiny_case import N_THREADS, Case

import fedbpt
from fedbpt.engine.text_generator import Placed, Sampling
from fedbpt.errors import InputError, ScoringInterrupted

LENGTHS = [3, 40, 5, 17, 70]
MAX_TOKENS = 9


def rows_of(case: Case, n: int, placement: str) -> np.ndarray:
    n_rows = {"cue": 2, "layer": 1, "layers": case.scorer.n_layer}[placement]
    drawn = np.random.default_rng(3).standard_normal((n, n_rows, case.scorer.n_embd))
    return drawn.astype(np.float32)


def plan_of(case: Case, texts: list[Any], placement: Any = "cue") -> Any:
    return case.scorer.compile(texts, None, placement, layer=1 if placement == "layer" else None)


def one_by_one(case: Case, text: np.ndarray, rows: np.ndarray, placement: str, sampling: Sampling) -> list[int]:
    """The tokens that the generator for single texts chooses."""
    n_layer = case.scorer.n_layer
    if placement == "cue":
        placed = Placed(text, rows, len(text) - len(rows))
    else:
        shifted = (0, n_layer, True) if placement == "layers" else (1, 1, False)
        placed = Placed(text, rows, len(text) - 1, shifted)
    stream = case.scorer.generator.open(placed, sampling)
    found = []
    for _ in range(MAX_TOKENS):
        token = stream.next().id
        if case.scorer.generator.is_end(token):
            break
        found.append(token)
    stream.close()
    return found


@pytest.mark.parametrize("placement", ["cue", "layer", "layers"])
def test_answers_are_those_of_the_generator_for_single_texts(repeatable: Case, placement: str) -> None:
    texts, rows = repeatable.texts(LENGTHS), rows_of(repeatable, 3, placement)
    found = plan_of(repeatable, texts, placement).generate(rows, max_tokens=MAX_TOKENS)
    assert [len(answers) for answers in found] == [len(texts)] * 3
    same = [
        answer.ids.tolist() == one_by_one(repeatable, text, rows[c], placement, Sampling())
        for c, answers in enumerate(found)
        for text, answer in zip(texts, answers, strict=True)
    ]
    assert np.mean(same) > 0.9  # a single text's attention adds up in another order: near ties may fall otherwise


def test_the_first_token_is_the_likeliest_by_the_scores(repeatable: Case) -> None:
    texts, rows = repeatable.texts(LENGTHS), rows_of(repeatable, 4, "layers")
    plan = plan_of(repeatable, texts, "layers")
    first = [[answer.ids[:1].tolist() for answer in answers] for answers in plan.generate(rows, max_tokens=1)]
    likeliest = plan.score(rows).argmax(axis=2)
    pairs = [(first[c][t], [int(likeliest[c, t])]) for c in range(4) for t in range(len(texts))]
    assert all(ids in ([], best) for ids, best in pairs)
    assert sum(ids == best for ids, best in pairs) > 15  # the others are ends of text


def test_an_answer_does_not_depend_on_others_or_on_earlier_calls(repeatable: Case) -> None:
    texts, rows = repeatable.texts(LENGTHS * 3), rows_of(repeatable, 30, "layers")  # several passes of 128
    plan = plan_of(repeatable, texts, "layers")
    whole = plan.generate(rows, max_tokens=MAX_TOKENS)
    some = plan.generate(rows[7:9], [4, 0], max_tokens=MAX_TOKENS)
    same = [
        answer.ids.tolist() == whole[7 + c][text].ids.tolist()
        for c, answers in enumerate(some)
        for answer, text in zip(answers, (4, 0), strict=True)
    ]
    # Attention of float32 models sums over cells in the order in which they lie: a near tie may fall otherwise.
    assert sum(same) >= (3 if repeatable.weights == "f32" else 4)
    again = plan_of(repeatable, texts, "layers").generate(rows, max_tokens=MAX_TOKENS)
    assert [[a.ids.tolist() for a in own] for own in again] == [[a.ids.tolist() for a in own] for own in whole]


def test_zeros_and_no_rows_are_the_model_as_it_is(repeatable: Case) -> None:
    texts = repeatable.texts(LENGTHS)
    zeros = np.zeros((1, repeatable.scorer.n_layer, repeatable.scorer.n_embd), np.float32)
    shifted = plan_of(repeatable, texts, "layers").generate(zeros, max_tokens=MAX_TOKENS)[0]
    plain = plan_of(repeatable, texts).generate(zeros[:, :0], max_tokens=MAX_TOKENS)[0]
    assert [answer.ids.tolist() for answer in shifted] == [answer.ids.tolist() for answer in plain]


def test_samples_are_common_to_candidates_and_repeatable_by_their_seed(llama: Case) -> None:
    texts = llama.texts([5, 5, 9])
    texts[1] = texts[0]
    rows = np.zeros((2, llama.scorer.n_layer, llama.scorer.n_embd), np.float32)

    def drawn(seed: int) -> list[list[list[int]]]:
        plan = plan_of(llama, texts, "layers")
        sampling = Sampling(temperature=1.0, seed=seed)
        return [[a.ids.tolist() for a in own] for own in plan.generate(rows, sampling=sampling, max_tokens=12)]

    first = drawn(1)
    assert first[0] == first[1]  # equal candidates
    assert first[0][0] != first[0][1]  # equal texts have random numbers of their own
    assert drawn(1) == first
    assert drawn(2) != first


def test_a_stop_string_ends_an_answer_before_it(llama: Case) -> None:
    [text] = llama.texts([9])
    plan = plan_of(llama, [text])
    none = np.zeros((1, 0, llama.scorer.n_embd), np.float32)
    [[whole]] = plan.generate(none, max_tokens=20)
    stop = next(piece for piece in re.findall("[ -~]{2}", whole.text[3:]))  # two characters of ASCII
    [[stopped]] = plan.generate(none, max_tokens=20, stop=[stop, "never in it"])
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert len(stopped.ids) < len(whole.ids)


def test_texts_of_one_candidate_share_their_kv_with_the_others(llama: Case) -> None:
    scorer = fedbpt.load_model(llama.path, n_threads=N_THREADS)
    plan = scorer.compile(llama.texts([40, 50]), None, "layers")
    zeros = np.zeros((10, scorer.n_layer, scorer.n_embd), np.float32)
    plan.generate(zeros, max_tokens=4)
    before = plan.n_tokens
    plan.generate(zeros, max_tokens=4)
    assert plan.n_tokens - before <= 10 * 2 * 4


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"max_tokens": 100_000}, ("max_tokens", "100000")),
        ({"stop": [""]}, ("stop",)),
        ({"indices": [9]}, ("9",)),
    ],
    ids=["too long", "empty stop", "index"],
)
def test_wrong_arguments_are_refused(llama: Case, changes: dict[str, Any], values: tuple[str, ...]) -> None:
    plan = plan_of(llama, llama.texts([5]))
    with raises(InputError) as caught:
        plan.generate(np.zeros((1, 0, llama.scorer.n_embd)), **{"max_tokens": 4, **changes})
    assert [value for value in values if value not in str(caught.value)] == []


@pytest.mark.parametrize(("labels", "placement"), [(None, "front"), ([5], "cue")])
def test_a_plan_that_cannot_be_continued_is_refused(llama: Case, labels: Any, placement: Any) -> None:
    plan = llama.scorer.compile(llama.texts([5]), labels, placement)
    with raises(InputError):
        plan.generate(np.zeros((1, 0, llama.scorer.n_embd)), max_tokens=4)


def test_more_rows_than_fit_into_a_pass_with_128_texts(repeatable: Case) -> None:
    texts = repeatable.texts([60] * 8)
    rows = np.random.default_rng(1).standard_normal((16, 30, repeatable.scorer.n_embd)).astype(np.float32)
    found = plan_of(repeatable, texts).generate(rows, max_tokens=3)
    few = plan_of(repeatable, texts).generate(rows[5:6], max_tokens=3)[0]
    same = [one.ids.tolist() == other.ids.tolist() for one, other in zip(found[5], few, strict=True)]
    assert sum(same) >= (7 if repeatable.weights == "f32" else 8)


def test_a_call_can_be_interrupted(llama: Case) -> None:
    scorer = fedbpt.load_model(llama.path, n_threads=N_THREADS)
    plan = scorer.compile(llama.texts([9] * 60), None, "layers")
    rows = np.zeros((60, scorer.n_layer, scorer.n_embd), np.float32)
    done = threading.Event()

    def interrupt() -> None:
        while not done.wait(0.05):
            scorer.interrupt()

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with raises(ScoringInterrupted):
            plan.generate(rows, max_tokens=100)
    finally:
        done.set()
        thread.join()
    assert len(plan.generate(rows[:1], max_tokens=1)[0]) == 60


def test_scores_between_change_nothing(llama: Case) -> None:
    scorer, texts = llama.scorer, llama.texts(LENGTHS)
    none = np.zeros((1, 0, scorer.n_embd), np.float32)
    plan = scorer.compile(texts, None, "cue")
    expected = [answer.ids.tolist() for answer in plan.generate(none, max_tokens=5)[0]]
    scorer.score_with_soft_prompt(texts, none, [5])  # another context
    assert [answer.ids.tolist() for answer in plan.generate(none, max_tokens=5)[0]] == expected
