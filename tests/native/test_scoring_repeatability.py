"""A candidate's logits depend only on the candidate and the data: the same bits whatever is scored with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from numpy.typing import NDArray
from tiny_case import N_THREADS, Case

import fedbpt
from fedbpt import models
from fedbpt.errors import InputError

LENGTHS = [3, 40, 5, 17, 26, 4, 9, 70]
PLACEMENTS = pytest.mark.parametrize("placement", ["front", "cue"])


def score(case: Case, embeds: NDArray[np.float32], **how: Any) -> NDArray[np.float32]:
    how = {"label_ids": [5, 300, 17], "prefix": [1, 44], **how}
    return case.scorer.score_with_soft_prompt(case.texts(LENGTHS), embeds, **how)


@PLACEMENTS
def test_the_same_call_gives_the_same_bits(repeatable: Case, placement: str) -> None:
    embeds = repeatable.prompts(5, 3)
    first = score(repeatable, embeds, placement=placement)
    for _ in range(3):
        np.testing.assert_array_equal(score(repeatable, embeds, placement=placement), first)


def test_two_compute_threads_give_the_same_bits_each_time(repeatable: Case) -> None:
    scorer = fedbpt.load_model(repeatable.path, n_threads=2)
    texts, embeds = repeatable.texts([9, 40]), repeatable.prompts(2, 3)
    first = scorer.score_with_soft_prompt(texts, embeds)
    for _ in range(2):
        np.testing.assert_array_equal(scorer.score_with_soft_prompt(texts, embeds), first)


@PLACEMENTS
def test_the_order_of_candidates_changes_no_bit(repeatable: Case, placement: str) -> None:
    embeds = repeatable.prompts(17, 3)
    order = np.random.default_rng(0).permutation(17)
    expected = score(repeatable, embeds, placement=placement)[order]
    np.testing.assert_array_equal(score(repeatable, embeds[order], placement=placement), expected)


@PLACEMENTS
@pytest.mark.parametrize("n_prompt", [0, 1, 3])
def test_the_number_of_candidates_changes_no_bit(repeatable: Case, placement: str, n_prompt: int) -> None:
    embeds = repeatable.prompts(40, n_prompt)
    together = score(repeatable, embeds, placement=placement)
    for first, last in [(0, 1), (39, 40), (5, 7), (3, 34)]:
        np.testing.assert_array_equal(score(repeatable, embeds[first:last], placement=placement), together[first:last])


@PLACEMENTS
def test_a_candidate_given_twice_has_equal_scores(repeatable: Case, placement: str) -> None:
    embeds = repeatable.prompts(2, 3)[[0, 1, 0, 1, 0]]
    scored = score(repeatable, embeds, placement=placement)
    np.testing.assert_array_equal(scored[[2, 4]], scored[[0, 0]])
    np.testing.assert_array_equal(scored[3], scored[1])


@PLACEMENTS
def test_one_candidate_may_lack_the_leading_axis(repeatable: Case, placement: str) -> None:
    embeds = repeatable.prompts(1, 3)
    np.testing.assert_array_equal(
        score(repeatable, embeds[0], placement=placement), score(repeatable, embeds, placement=placement)
    )


@PLACEMENTS
def test_earlier_calls_change_no_bit(repeatable: Case, placement: str) -> None:
    embeds = repeatable.prompts(4, 3)
    first = score(repeatable, embeds, placement=placement)
    scorer = repeatable.scorer
    scorer.score_with_soft_prompt(repeatable.texts([300, 7, 60]), repeatable.prompts(2, 50), placement="front")
    scorer.score_with_soft_prompt(repeatable.texts([200, 70]), repeatable.prompts(3, 1), placement="cue")
    scorer.score_with_soft_prompt(repeatable.texts(LENGTHS), repeatable.prompts(1, 3), prefix=repeatable.ids(30))
    score(repeatable, repeatable.prompts(9, 3, seed=1), placement=placement)
    score(repeatable, embeds, placement=placement, label_ids=None)
    with pytest.raises(InputError):
        score(repeatable, np.full_like(embeds, np.nan), placement=placement)
    np.testing.assert_array_equal(score(repeatable, embeds, placement=placement), first)


@PLACEMENTS
def test_texts_changed_in_place_are_scored_again(llama: Case, placement: str) -> None:
    """A cache keyed by the identity of the caller's arrays would return the old scores."""
    texts, embeds = llama.texts([9, 30]), llama.prompts(2, 3)
    llama.scorer.score_with_soft_prompt(texts, embeds, placement=placement)
    texts[0][2] = (texts[0][2] + 1 - 3) % (llama.model.n_vocab - 3) + 3
    actual = llama.scorer.score_with_soft_prompt(texts, embeds, placement=placement)
    assert np.abs(actual - llama.reference.score(texts, embeds, placement=placement)).max() <= 1e-3


@PLACEMENTS
def test_a_freshly_loaded_model_gives_the_same_bits(repeatable: Case, placement: str) -> None:
    embeds = repeatable.prompts(4, 3)
    fresh = fedbpt.load_model(repeatable.path, n_threads=N_THREADS)
    how = {"label_ids": [5, 300, 17], "prefix": [1, 44], "placement": placement}
    actual = fresh.score_with_soft_prompt(repeatable.texts(LENGTHS), embeds, **how)
    np.testing.assert_array_equal(actual, score(repeatable, embeds, placement=placement))


@pytest.fixture(scope="module")
def k_quant(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Make a model whose matrices all have the named format, with blocks of 256 weights."""
    folder = tmp_path_factory.mktemp("k-quants")
    model = replace(tiny_gguf.LLAMA, n_embd=256, n_head=8, n_head_kv=8, head_dim=32, n_ff=512, n_layer=2)
    plain = tiny_gguf.write(folder / "plain.gguf", model)
    return lambda format: Case(model, models.requantize(plain, format, force=True, n_threads=1).path)


@PLACEMENTS
@pytest.mark.parametrize("format", ["q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k"])
def test_the_number_of_candidates_moves_no_bit_of_k_quants(
    k_quant: Callable[[str], Case], format: str, placement: str
) -> None:
    """Fails if kernels for many columns round differently from those for few."""
    case = k_quant(format)
    texts, embeds = case.texts([30, 9]), case.prompts(24, 4)
    together = case.scorer.score_with_soft_prompt(texts, embeds, [5, 300, 17], placement)
    for first, last in [(0, 1), (3, 5), (7, 12), (0, 24)]:
        alone = case.scorer.score_with_soft_prompt(texts, embeds[first:last], [5, 300, 17], placement)
        np.testing.assert_array_equal(alone, together[first:last])
