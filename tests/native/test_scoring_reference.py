"""The scorer's logits against the numpy reference, text by text and candidate by candidate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_case import Case

TOLERANCE = 1e-3  # max |Δlogit| on float32 weights; the logits themselves spread over ten units
LABELS = [259, 3, 411]  # neither sorted nor adjacent


def largest_difference(case: Case, texts: list[NDArray[np.int32]], embeds: NDArray[np.float32], **how: Any) -> float:
    """max |Δlogit| over candidates, texts and labels."""
    actual = case.scorer.score_with_soft_prompt(texts, embeds, **how)
    expected = case.reference.score(texts, embeds, **how)
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max())


def no_prompt(case: Case) -> NDArray[np.float32]:
    return np.zeros((1, 0, case.model.n_embd), np.float32)


def test_logits_of_plain_texts_match_at_every_length(case: Case) -> None:
    texts = case.texts([1, 2, 3, 23, 24, 25, 64, 300])
    assert largest_difference(case, texts, no_prompt(case)) <= TOLERANCE


def test_each_prefix_of_a_text_scores_as_a_text_of_its_own(case: Case) -> None:
    whole = case.ids(40)
    scored = case.scorer.score_with_soft_prompt([whole[:end] for end in range(1, 41)], no_prompt(case))
    assert np.abs(scored[0] - case.reference.logits(whole)).max() <= TOLERANCE


@pytest.mark.parametrize("with_prefix", [False, True])
@pytest.mark.parametrize("n_prompt", [0, 1, 50])
@pytest.mark.parametrize(("placement", "lengths"), [("front", [1, 150, 4, 37]), ("cue", [50, 150, 51, 87])])
def test_soft_prompts_match(case: Case, placement: str, lengths: list[int], n_prompt: int, with_prefix: bool) -> None:
    prefix = case.ids(7, seed=99) if with_prefix else None
    embeds = case.prompts(2, n_prompt)
    how = {"label_ids": LABELS, "placement": placement, "prefix": prefix}
    assert largest_difference(case, case.texts(lengths), embeds, **how) <= TOLERANCE


@pytest.mark.parametrize("placement", ["front", "cue"])
def test_many_candidates_match(case: Case, placement: str) -> None:
    texts = case.texts([5, 31, 12])
    embeds = case.prompts(24, 4)
    assert largest_difference(case, texts, embeds, placement=placement, prefix=[1]) <= TOLERANCE


@pytest.mark.parametrize("placement", ["front", "cue"])
def test_a_prefix_longer_than_an_attention_window_matches(case: Case, placement: str) -> None:
    how = {"label_ids": LABELS, "placement": placement, "prefix": case.ids(150, seed=3)}
    assert largest_difference(case, case.texts([2, 61, 9]), case.prompts(3, 2), **how) <= TOLERANCE


@pytest.mark.parametrize("placement", ["front", "cue"])
def test_more_texts_than_a_context_holds_sequences_match(case: Case, placement: str) -> None:
    lengths = np.random.default_rng(5).integers(2, 16, 290).tolist()
    assert len(lengths) > 256
    assert sum(lengths) > 2048
    embeds = case.prompts(1, 2)
    how = {"label_ids": LABELS, "placement": placement}
    assert largest_difference(case, case.texts(lengths), embeds, **how) <= TOLERANCE


@pytest.mark.parametrize("placement", ["front", "cue"])
def test_more_tokens_than_one_batch_holds_match(case: Case, placement: str) -> None:
    lengths = [300, 3, 290, 7, 310, 300, 2, 260, 280, 330, 3]
    assert sum(lengths) > 2048
    embeds = case.prompts(2, 2)
    assert largest_difference(case, case.texts(lengths), embeds, placement=placement) <= TOLERANCE


def test_a_text_may_fill_the_whole_context(case: Case) -> None:
    texts = [case.ids(case.model.n_ctx)]
    assert largest_difference(case, texts, no_prompt(case), label_ids=LABELS) <= TOLERANCE


def test_prefix_prompt_and_text_may_fill_the_whole_context(case: Case) -> None:
    texts = [case.ids(case.model.n_ctx - 12), case.ids(1)]
    embeds = case.prompts(2, 10)
    assert largest_difference(case, texts, embeds, label_ids=LABELS, prefix=[1, 5]) <= TOLERANCE


def test_the_rows_may_replace_a_whole_text(case: Case) -> None:
    embeds = case.prompts(3, 6)
    assert largest_difference(case, case.texts([6, 6]), embeds, placement="cue") <= TOLERANCE


def test_texts_that_are_equal_score_equally(llama: Case) -> None:
    text = llama.ids(9)
    assert largest_difference(llama, [text, text, text], llama.prompts(2, 3)) <= TOLERANCE


def test_all_logits_are_returned_without_labels(case: Case) -> None:
    texts = case.texts([4, 9])
    every = case.scorer.score_with_soft_prompt(texts, case.prompts(2, 3))
    some = case.scorer.score_with_soft_prompt(texts, case.prompts(2, 3), label_ids=LABELS)
    assert every.shape == (2, 2, case.model.n_vocab)
    np.testing.assert_allclose(some, every[:, :, LABELS], atol=1e-4, rtol=0)


def test_an_empty_prefix_equals_no_prefix(llama: Case) -> None:
    texts, embeds = llama.texts([4, 9]), llama.prompts(2, 3)
    empty = llama.scorer.score_with_soft_prompt(texts, embeds, prefix=[])
    np.testing.assert_array_equal(empty, llama.scorer.score_with_soft_prompt(texts, embeds, prefix=None))


@pytest.mark.parametrize("with_prefix", [False, True])
def test_front_rows_that_are_token_embeddings_score_as_the_tokens(case: Case, with_prefix: bool) -> None:
    prefix = case.ids(3, seed=7) if with_prefix else case.ids(0)
    tokens, texts = case.ids(20, seed=8), case.texts([1, 30, 5])
    by_rows = case.scorer.score_with_soft_prompt(texts, case.scorer.token_embeddings(tokens), prefix=prefix)
    joined = [np.concatenate([prefix, tokens, text]) for text in texts]
    by_tokens = case.scorer.score_with_soft_prompt(joined, no_prompt(case))
    np.testing.assert_allclose(by_rows, by_tokens, atol=TOLERANCE, rtol=0)


def test_cue_rows_that_are_the_cues_own_embeddings_change_nothing(case: Case) -> None:
    cue = case.ids(5, seed=8)
    texts = [np.concatenate([text, cue]) for text in case.texts([1, 30, 5])]
    by_rows = case.scorer.score_with_soft_prompt(texts, case.scorer.token_embeddings(cue), placement="cue")
    by_tokens = case.scorer.score_with_soft_prompt(texts, no_prompt(case))
    np.testing.assert_allclose(by_rows, by_tokens, atol=TOLERANCE, rtol=0)


def test_the_soft_prompt_matters(case: Case) -> None:
    scored = case.scorer.score_with_soft_prompt(case.texts([6]), case.prompts(2, 3), placement="cue")
    assert np.abs(scored[0] - scored[1]).max() > 1.0


@pytest.mark.parametrize(
    ("weights", "worst", "typical"), [("f16", 0.1, 0.01), ("q8_0", 1.0, 0.12), ("q4_1", 1.0, 0.12)]
)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_narrow_weights_match_up_to_the_rounding_of_activations(
    case_of: Callable[..., Case], name: str, weights: str, worst: float, typical: float
) -> None:
    case = case_of(name, weights)
    texts, embeds = case.texts([1, 40, 9, 120]), case.prompts(2, 3)
    actual = case.scorer.score_with_soft_prompt(texts, embeds, prefix=[1])
    difference = np.abs(actual - case.reference.score(texts, embeds, prefix=[1]))
    assert difference.max() <= worst
    assert difference.mean() <= typical
