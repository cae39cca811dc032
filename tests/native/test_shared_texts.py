"""Texts with a common prefix are computed from its end on, and get the same bits as alone."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_case import N_THREADS, Case

import fedbpt

LABELS = [5, 17, 200]


def shares(case: Case) -> bool:
    """Whether a token's bits do not depend on the rest of its batch; a sliding window does not matter."""
    return case.model.weights != "f32"


def rows(case: Case, n: int = 4) -> list[NDArray[np.int32]]:
    return case.texts([20 + 3 * i for i in range(n)])


def with_end(texts: list[NDArray[np.int32]], end: list[int]) -> list[NDArray[np.int32]]:
    return [np.concatenate([text, np.array(end, dtype=np.int32)]) for text in texts]


@pytest.mark.parametrize("keep_kv", [True, False])
@pytest.mark.parametrize("n_prompt", [0, 1, 3])
def test_a_text_with_another_end_costs_a_few_tokens_and_gets_the_same_bits(
    repeatable: Case, n_prompt: int, keep_kv: bool
) -> None:
    texts, embeds = rows(repeatable), repeatable.prompts(3, n_prompt)
    ends = [[7, 8, 9], [10, 11, 12, 13, 14], [7, 8, 11], [7, 8, 9]]
    alone = []
    for end in ends:
        fresh = fedbpt.load_model(repeatable.path, n_threads=N_THREADS)
        alone.append(fresh.compile(with_end(texts, end), LABELS, "cue", keep_kv=False).score(embeds))

    scorer = fedbpt.load_model(repeatable.path, n_threads=N_THREADS)
    n_tail = max(n_prompt, 1)
    plans = []
    for number, (end, expected) in enumerate(zip(ends, alone, strict=True)):
        plans.append(scorer.compile(with_end(texts, end), LABELS, "cue", keep_kv=keep_kv))
        np.testing.assert_array_equal(plans[-1].score(embeds), expected)
        tails = len(texts) * len(embeds) * n_tail
        anew = sum(map(len, texts)) + len(texts) * (len(end) - n_tail) + tails
        assert plans[-1].n_tokens <= anew
        if shares(repeatable) and number > 0:
            assert plans[-1].n_tokens <= tails + len(texts) * len(end)
        elif number == 0 or repeatable.model.weights == "f32":
            assert plans[-1].n_tokens == anew


def test_the_kept_kv_of_a_plan_is_reused_by_later_plans(repeatable: Case) -> None:
    texts, embeds = rows(repeatable, 60), repeatable.prompts(1, 1)  # more than the scorer itself keeps
    scorer = fedbpt.load_model(repeatable.path, n_threads=N_THREADS)
    kept = scorer.compile(with_end(texts, [7, 8]), LABELS, "cue")
    kept.score(embeds)
    other = scorer.compile(with_end(texts, [9, 10]), LABELS, "cue", keep_kv=False)
    expected = other.score(embeds)
    if shares(repeatable):
        assert other.n_tokens == 2 * len(texts)  # only the end
    del kept
    again = scorer.compile(with_end(texts, [9, 10]), LABELS, "cue", keep_kv=False)
    np.testing.assert_array_equal(again.score(embeds), expected)
    assert again.n_tokens > sum(map(len, texts[:20]))  # freed with the plan


def test_the_beginning_of_a_longer_text_is_reused(repeatable: Case) -> None:
    [text], embeds = repeatable.texts([60]), repeatable.prompts(2, 1)
    fresh = fedbpt.load_model(repeatable.path, n_threads=N_THREADS)
    expected = fresh.compile([text[:25]], LABELS, "cue").score(embeds)
    scorer = fedbpt.load_model(repeatable.path, n_threads=N_THREADS)
    scorer.compile([text], LABELS, "cue").score(embeds)
    short = scorer.compile([text[:25]], LABELS, "cue")
    np.testing.assert_array_equal(short.score(embeds), expected)
    assert short.n_tokens == (2 if shares(repeatable) else 24 + 2)


def test_a_prefix_is_a_part_of_the_beginning(repeatable: Case) -> None:
    texts, embeds = rows(repeatable, 2), repeatable.prompts(1, 1)
    prefix = repeatable.ids(9, seed=5)
    fresh = fedbpt.load_model(repeatable.path, n_threads=N_THREADS)
    expected = fresh.compile(texts, LABELS, "cue", prefix).score(embeds)
    scorer = fedbpt.load_model(repeatable.path, n_threads=N_THREADS)
    scorer.compile(texts, LABELS, "cue").score(embeds)  # the same texts at other positions
    plan = scorer.compile(texts, LABELS, "cue", prefix)
    np.testing.assert_array_equal(plan.score(embeds), expected)
    assert plan.n_tokens >= sum(map(len, texts))


def test_texts_of_one_plan_that_begin_alike_share_their_beginning(repeatable: Case) -> None:
    [start], ends, embeds = repeatable.texts([60]), rows(repeatable, 20), repeatable.prompts(2, 1)
    texts = [np.concatenate([start, end]) for end in ends]
    scorer = fedbpt.load_model(repeatable.path, n_threads=N_THREADS)
    plan = scorer.compile(texts, LABELS, "cue", keep_kv=False)
    together = plan.score(embeds)
    for i in (0, 1, 19) if shares(repeatable) else ():
        fresh = fedbpt.load_model(repeatable.path, n_threads=N_THREADS)
        np.testing.assert_array_equal(
            fresh.compile(texts[i : i + 1], LABELS, "cue").score(embeds)[:, 0], together[:, i]
        )
    if shares(repeatable):
        assert plan.n_tokens < 2 * len(start) + sum(map(len, ends)) + 2 * len(texts)
