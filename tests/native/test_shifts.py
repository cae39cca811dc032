"""Rows that are added to layers' outputs: placements ``layer`` and ``layers``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tests.support.raises import raises
from tiny_case import N_THREADS, Case

import fedbpt
from fedbpt.errors import InputError

LABELS = [5, 300, 17]
LENGTHS = [3, 40, 5, 17, 70]


def test_zeros_are_no_prompt_bit_for_bit(repeatable: Case) -> None:
    scorer, texts = repeatable.scorer, repeatable.texts(LENGTHS)
    plain = scorer.score_with_soft_prompt(texts, np.zeros((1, 0, scorer.n_embd)), LABELS, "cue")
    one = scorer.score_with_soft_prompt(texts, np.zeros((2, 1, scorer.n_embd)), LABELS, "layer", layer=1)
    every = scorer.score_with_soft_prompt(texts, np.zeros((2, scorer.n_layer, scorer.n_embd)), LABELS, "layers")
    for found in (*one, *every):
        np.testing.assert_array_equal(found, plain[0])


def test_a_candidate_has_the_same_bits_whatever_is_scored_with_it(repeatable: Case) -> None:
    scorer, texts, rows = repeatable.scorer, repeatable.texts(LENGTHS), repeatable.prompts(40, 1)
    together = scorer.score_with_soft_prompt(texts, rows, LABELS, "layer", layer=1)
    assert len(np.unique(together[:, 0, 0])) == 40
    for first, last in [(0, 1), (39, 40), (5, 8)]:
        some = scorer.score_with_soft_prompt(texts, rows[first:last], LABELS, "layer", layer=1)
        np.testing.assert_array_equal(some, together[first:last])


def test_states_show_the_row_where_it_is_added_and_its_effect_later(case: Case) -> None:
    scorer, texts, rows = case.scorer, case.texts(LENGTHS), case.prompts(2, 1)
    layers = range(scorer.n_layer)
    before = scorer.compile(texts, [], "cue", layers=layers).states()
    after = scorer.compile(texts, [], "layer", layer=1, layers=layers).states(embeds=rows)
    np.testing.assert_array_equal(after[:, :, 0], np.stack([before[:, 0]] * 2))
    np.testing.assert_allclose(after[:, :, 1] - before[:, 1], np.repeat(rows, len(texts), axis=1), atol=1e-4)
    assert (np.abs(after[:, :, 2] - before[:, 2]).max(axis=-1) > 1e-3).all()


def test_a_kept_text_costs_one_token_a_candidate(llama: Case) -> None:
    scorer, texts = fedbpt.load_model(llama.path, n_threads=N_THREADS), llama.texts(LENGTHS)
    plan = scorer.compile(texts, LABELS, "layers")
    rows = np.ones((3, scorer.n_layer, scorer.n_embd), np.float32)
    plan.score(rows)
    before = plan.n_tokens
    plan.score(rows)
    assert plan.n_tokens - before == 3 * len(texts)


# --- candidates that resume from a layer -----------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
def test_a_candidate_that_resumes_has_the_bits_of_one_that_runs_every_layer(repeatable: Case, layer: int) -> None:
    """States are asked for to run every layer."""
    scorer, texts, rows = repeatable.scorer, repeatable.texts(LENGTHS), repeatable.prompts(5, 1)
    whole, _ = scorer.compile(texts, LABELS, "layer", layer=layer, layers=[layer]).score_states(rows)
    plan = scorer.compile(texts, LABELS, "layer", layer=layer)
    np.testing.assert_array_equal(plan.score(rows), whole)
    some, _ = scorer.compile(texts, LABELS, "layer", layer=layer, layers=[layer]).score_states(rows[2:3], [3, 1])
    np.testing.assert_array_equal(plan.score(rows[2:3], [3, 1]), some)
    again = scorer.compile(texts, LABELS, "layer", layer=layer).score(rows)
    np.testing.assert_array_equal(again, whole)


@pytest.fixture
def quantised(case_of: Callable[..., Case]) -> Case:
    """A model that can resume: of float32 weights, all layers run."""
    return case_of("llama", "q8_0")


def test_a_candidate_that_resumes_costs_the_layers_that_it_runs(quantised: Case) -> None:
    scorer, texts = fedbpt.load_model(quantised.path, n_threads=N_THREADS), quantised.texts(LENGTHS)
    plan = scorer.compile(texts, LABELS, "layer", layer=1)
    rows = np.ones((30, 1, scorer.n_embd), np.float32)
    plan.score(rows)
    before = plan.n_tokens
    plan.score(rows)
    assert scorer.n_layer == 3
    assert plan.n_tokens - before == 30 * len(texts) / 3


def test_a_model_of_float32_weights_runs_every_layer(llama: Case) -> None:
    scorer, texts = fedbpt.load_model(llama.path, n_threads=N_THREADS), llama.texts(LENGTHS)
    plan = scorer.compile(texts, LABELS, "layer", layer=1)
    plan.score(np.ones((3, 1, scorer.n_embd), np.float32))
    before = plan.n_tokens
    plan.score(np.ones((3, 1, scorer.n_embd), np.float32))
    assert plan.n_tokens - before == 3 * len(texts)


def test_the_first_candidates_of_a_scorer_run_both_ways_to_compare(quantised: Case) -> None:
    scorer, texts = fedbpt.load_model(quantised.path, n_threads=N_THREADS), quantised.texts(LENGTHS)
    rows = np.ones((30, 1, scorer.n_embd), np.float32)
    plans = [scorer.compile(texts, LABELS, "layer", layer=1, keep_kv=False) for _ in range(2)]
    for plan in plans:
        plan.score(rows)
    assert plans[0].n_tokens - plans[1].n_tokens >= 30 * len(texts)


@pytest.mark.parametrize("continuations", [[[5], [300]], [[5, 6], [300]]], ids=["one token", "several"])
def test_continuations_are_the_same_from_a_layer_on(repeatable: Case, continuations: list[list[int]]) -> None:
    scorer, texts, rows = repeatable.scorer, repeatable.texts(LENGTHS), repeatable.prompts(3, 1)
    follow = [continuations] * len(texts)
    whole, _ = scorer.compile(texts, [], "layer", layer=1, layers=[1], continuations=follow).score_states(rows)
    plan = scorer.compile(texts, [], "layer", layer=1, continuations=follow)
    np.testing.assert_array_equal(plan.score(rows), whole)
    before = plan.n_tokens
    plan.score(rows)
    n_steps = sum(len(each) - 1 for each in continuations)
    whole_tokens = 3 * len(texts) * (1 + n_steps)
    resumes = not n_steps and repeatable.model.weights != "f32"
    expected = whole_tokens * (scorer.n_layer - 2) / scorer.n_layer if resumes else whole_tokens
    assert plan.n_tokens - before == pytest.approx(expected, abs=1)  # whole tokens are reported


def test_a_shift_of_the_last_layer_runs_every_layer(repeatable: Case) -> None:
    scorer, texts, rows = repeatable.scorer, repeatable.texts(LENGTHS), repeatable.prompts(3, 1)
    last = scorer.n_layer - 1
    plan = scorer.compile(texts, LABELS, "layer", layer=last)
    whole, _ = scorer.compile(texts, LABELS, "layer", layer=last, layers=[0]).score_states(rows)
    np.testing.assert_array_equal(plan.score(rows), whole)


def test_other_placements_between_do_not_meet_the_states(repeatable: Case) -> None:
    scorer, texts, rows = repeatable.scorer, repeatable.texts(LENGTHS), repeatable.prompts(3, 1)
    shifted = scorer.compile(texts, LABELS, "layer", layer=1)
    plain = scorer.compile(texts, LABELS, "cue")
    first, first_plain = shifted.score(rows), plain.score(rows)
    for _ in range(2):
        np.testing.assert_array_equal(plain.score(rows), first_plain)
        np.testing.assert_array_equal(shifted.score(rows), first)


@pytest.mark.parametrize(
    ("placement", "layer", "n_rows", "values"),
    [
        ("layer", None, 1, ("layer",)),
        ("cue", 1, 1, ("'cue'",)),
        ("layer", 3, 1, ("0", "2", "3")),
        ("layer", -1, 1, ("-1",)),
        ("layer", 1, 2, ("1", "2")),
        ("layers", None, 1, ("3", "1")),
    ],
)
def test_a_shift_that_does_not_fit_is_refused(
    llama: Case, placement: str, layer: int | None, n_rows: int, values: tuple[str, ...]
) -> None:
    rows = np.zeros((1, n_rows, llama.scorer.n_embd))
    with raises(InputError) as caught:
        llama.scorer.score_with_soft_prompt(llama.texts([3]), rows, LABELS, placement, layer=layer)
    assert [value for value in values if value not in str(caught.value)] == []
