"""Log-probabilities of continuations against the numpy reference, and what they cost."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.raises import raises
from tiny_case import Case

import fedbpt
from fedbpt.errors import InputError

TOLERANCE = 1e-3  # nats per token, on float32 weights
WORDS = [[259], [3, 411], [7, 8, 9, 10], [411, 3, 5]]
LABELS = [5, 17, 200]


def log_probabilities(case: Case, inputs: NDArray[np.float64], continuations: list[list[int]]) -> NDArray[np.float64]:
    """Log-probabilities [K] of continuations of the embedding rows ``inputs`` [n, n_embd], one forward pass each."""
    found = []
    for ids in continuations:
        rows = np.concatenate([inputs, case.reference.token_embeddings(ids[:-1]).reshape(-1, inputs.shape[1])])
        logits = case.reference.logits(rows)[len(inputs) - 1 :]
        top = logits.max(axis=1, keepdims=True)
        log_p = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
        found.append(log_p[np.arange(len(ids)), ids].sum())
    return np.array(found)


def joined(case: Case, text: NDArray[np.int32], rows: NDArray[np.float32], placement: str) -> NDArray[np.float64]:
    embeds = case.reference.token_embeddings(text)
    return np.concatenate([rows, embeds] if placement == "front" else [embeds[: len(text) - len(rows)], rows])


@pytest.mark.parametrize("n_prompt", [0, 1, 4])
@pytest.mark.parametrize("placement", ["front", "cue"])
def test_label_words_of_several_tokens_match(case: Case, placement: str, n_prompt: int) -> None:
    texts, embeds = case.texts([9, 31, 60, 5, 12, 4, 8, 9, 33, 21]), case.prompts(3, n_prompt)
    plan = case.scorer.compile(texts, LABELS, placement, continuations=[WORDS] * len(texts))
    found = plan.score(embeds)
    assert found.shape == (3, len(texts), len(WORDS) + len(LABELS))
    for c, rows in enumerate(embeds):
        for i, text in enumerate(texts):
            expected = log_probabilities(case, joined(case, text, rows, placement), WORDS)
            assert np.abs(found[c, i, : len(WORDS)] - expected).max() <= 4 * TOLERANCE
    plain = case.scorer.score_with_soft_prompt(texts, embeds, LABELS, placement)
    assert np.abs(found[:, :, len(WORDS) :] - plain).max() <= TOLERANCE


@pytest.mark.parametrize("placement", ["front", "cue"])
def test_each_text_has_its_own_continuation(case: Case, placement: str) -> None:
    texts, targets = case.texts([9, 40, 6]), [case.ids(n, seed=7).tolist() for n in (1, 70, 12)]
    embeds = case.prompts(2, 2)
    found = case.scorer.compile(texts, placement=placement, continuations=[[ids] for ids in targets]).score(embeds)
    assert found.shape == (2, 3, 1)
    for c, rows in enumerate(embeds):
        for i, text in enumerate(texts):
            [expected] = log_probabilities(case, joined(case, text, rows, placement), [targets[i]])
            assert abs(found[c, i, 0] - expected) <= TOLERANCE * len(targets[i])


def test_more_continuations_than_a_pack_has_sequences_match(case: Case) -> None:
    words = [[3 + i, 100 + i] for i in range(40)]
    texts, embeds = case.texts([9, 12]), case.prompts(1, 1)
    found = case.scorer.compile(texts, placement="cue", continuations=[words] * 2).score(embeds)
    for i, text in enumerate(texts):
        expected = log_probabilities(case, joined(case, text, embeds[0], "cue"), words)
        assert np.abs(found[0, i] - expected).max() <= 2 * TOLERANCE


@pytest.mark.parametrize("placement", ["front", "cue"])
def test_a_candidate_scores_the_same_alone_and_with_others(repeatable: Case, placement: str) -> None:
    texts, embeds = repeatable.texts([9, 31, 12]), repeatable.prompts(5, 2)
    plan = repeatable.scorer.compile(texts, LABELS, placement, continuations=[WORDS] * 3)
    together = plan.score(embeds)
    assert np.array_equal(np.concatenate([plan.score(one[None]) for one in embeds]), together)
    assert np.array_equal(plan.score(embeds[::-1]), together[::-1])


def test_in_the_cue_a_candidate_costs_its_rows_and_all_but_the_last_token_of_each_word(case: Case) -> None:
    texts, embeds = case.texts([9, 31]), case.prompts(3, 2)
    plan = case.scorer.compile(texts, placement="cue", continuations=[WORDS] * 2)
    plan.score(embeds)
    before = plan.n_tokens
    plan.score(embeds)
    assert plan.n_tokens - before == 3 * 2 * (2 + sum(len(word) - 1 for word in WORDS))


@pytest.mark.parametrize(
    ("continuations", "value"),
    [
        ([WORDS], "2"),
        ([WORDS, WORDS[:1]], "2"),
        ([[[1], []], [[1], [2]]], "continuation 1 of text 0"),
        ([[[1]], [[100_000]]], "100000"),
        ([[[5] * 5_000]] * 2, "4999"),
        ([[[3 + i, 4] for i in range(260)]] * 2, "260"),
        ([[], []], "label_ids"),
    ],
)
def test_bad_continuations_are_refused(case: Case, continuations: list[list[list[int]]], value: str) -> None:
    with raises(InputError) as refused:
        case.scorer.compile(case.texts([9, 5]), continuations=continuations).score(case.prompts(1, 1))
    assert value in str(refused.value)


def test_extreme_logits_give_finite_log_probabilities(case: Case) -> None:
    scorer: fedbpt.NativeScorer = case.scorer
    huge = 1e4 * case.prompts(1, 1)
    found = scorer.compile(case.texts([6]), placement="cue", continuations=[[[3, 4]]]).score(huge)
    assert np.isfinite(found).all()
    assert (found <= 0).all()
