"""Candidates that share a decode do not affect each other, whatever their number and wherever their cells lie."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_case import N_THREADS, Case

import fedbpt

LABELS = [5, 17, 200]
PLACEMENTS = pytest.mark.parametrize("placement", ["front", "cue"])


def some_texts(case: Case, n: int) -> list[NDArray[np.int32]]:
    lengths = np.random.default_rng(n).integers(4, 40, n)
    return case.texts([int(length) for length in lengths])


@PLACEMENTS
@pytest.mark.parametrize("n_prompt", [0, 1, 3])
@pytest.mark.parametrize("n_texts", [1, 3, 8, 33])
def test_a_candidate_gets_the_same_bits_alone_and_with_others(
    repeatable: Case, placement: str, n_texts: int, n_prompt: int
) -> None:
    embeds = repeatable.prompts(21, n_prompt)
    plan = repeatable.scorer.compile(some_texts(repeatable, n_texts), LABELS, placement)
    together = plan.score(embeds)
    for candidate in (0, 7, 20):
        np.testing.assert_array_equal(plan.score(embeds[candidate]), together[candidate : candidate + 1])


@PLACEMENTS
def test_more_candidates_than_sequences_are_scored_in_groups(repeatable: Case, placement: str) -> None:
    embeds = repeatable.prompts(300, 1)
    plan = repeatable.scorer.compile(some_texts(repeatable, 2), LABELS, placement)
    together = plan.score(embeds)
    for first in (0, 120, 250, 297):
        np.testing.assert_array_equal(plan.score(embeds[first : first + 3]), together[first : first + 3])


@PLACEMENTS
def test_an_overflowing_candidate_does_not_affect_others(repeatable: Case, placement: str) -> None:
    embeds = repeatable.prompts(9, 2)
    plan = repeatable.scorer.compile(some_texts(repeatable, 3), LABELS, placement)
    expected = plan.score(embeds)
    embeds[4] = 1e30
    actual = plan.score(embeds)
    np.testing.assert_array_equal(np.delete(actual, 4, axis=0), np.delete(expected, 4, axis=0))
    embeds[4] = repeatable.prompts(9, 2)[4]
    np.testing.assert_array_equal(plan.score(embeds), expected)


@PLACEMENTS
def test_the_number_of_threads_changes_no_bit(repeatable: Case, placement: str) -> None:
    texts, embeds = some_texts(repeatable, 5), repeatable.prompts(10, 2)
    expected = repeatable.scorer.score_with_soft_prompt(texts, embeds, LABELS, placement)
    threads = fedbpt.load_model(repeatable.path, n_threads=2 * N_THREADS)
    np.testing.assert_array_equal(threads.score_with_soft_prompt(texts, embeds, LABELS, placement), expected)


@PLACEMENTS
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_grouped_logits_are_the_models(case_of, name: str, placement: str) -> None:  # type: ignore[no-untyped-def]
    """Against numpy on the same weights, within the error of 8-bit activations."""
    case: Case = case_of(name, "q8_0")
    texts, embeds = some_texts(case, 6), case.prompts(20, 2)
    grouped = case.scorer.score_with_soft_prompt(texts, embeds, LABELS, placement)
    truth = case.reference.score(texts, embeds, placement=placement)[:, :, LABELS]
    assert np.abs(grouped - truth).max() <= 0.05 * np.abs(truth).max()
    assert np.corrcoef(grouped.ravel(), truth.ravel())[0, 1] > 0.999
