"""A plan scores like a call without one, whatever KV it keeps and in whatever order texts are scored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support.raises import raises
from tiny_case import Case

import fedbpt
from fedbpt.errors import InputError

LABELS = [5, 17, 200]
KV_OF_ONE_TEXT = 20_000  # bytes, roughly: the tiny models need 1 to 2 KB per token


def texts(case: Case, n: int = 24) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, case.model.n_vocab, 4 + int(i * 1.5)).astype(np.int32) for i in range(n)]


def prompts(scorer: fedbpt.NativeScorer, k: int, n_prompt: int = 2) -> np.ndarray:
    return np.random.default_rng(4).standard_normal((k, n_prompt, scorer.n_embd)).astype(np.float32)


@pytest.mark.parametrize("placement", ["front", "cue"])
@pytest.mark.parametrize("budget", [0, 6 * KV_OF_ONE_TEXT, 2**30])
def test_a_plan_gives_the_same_bits_as_a_call_without_one(repeatable: Case, placement: str, budget: int) -> None:
    scorer = fedbpt.load_model(repeatable.path, n_threads=1, kv_budget_bytes=budget)
    data, embeds = texts(repeatable), prompts(scorer, 3)
    plan = scorer.compile(data, LABELS, placement, prefix=[3, 4, 5])
    rng = np.random.default_rng(5)
    for _ in range(4):
        chosen = rng.choice(len(data), 7, replace=False)
        plain = scorer.score_with_soft_prompt([data[i] for i in chosen], embeds, LABELS, placement, [3, 4, 5])
        assert np.array_equal(plan.score(embeds, chosen), plain)
    assert plan.kv_bytes <= budget


def test_kept_texts_cost_only_the_rows(repeatable: Case) -> None:
    scorer = fedbpt.load_model(repeatable.path, n_threads=1)
    data = texts(repeatable)
    plan = scorer.compile(data, LABELS, "cue")
    plan.score(prompts(scorer, 3))
    assert plan.n_kept == len(data)
    before = plan.n_tokens
    plan.score(prompts(scorer, 3))
    assert plan.n_tokens - before == 3 * 2 * len(data)


def test_the_budget_bounds_the_kept_kv(repeatable: Case) -> None:
    scorer = fedbpt.load_model(repeatable.path, n_threads=1, kv_budget_bytes=6 * KV_OF_ONE_TEXT)
    plan = scorer.compile(texts(repeatable), LABELS, "cue")
    plan.score(prompts(scorer, 1))
    assert 0 < plan.n_kept < plan.n_texts
    assert 0 < plan.kv_bytes <= 6 * KV_OF_ONE_TEXT


def test_another_prompt_length_discards_kept_kv(repeatable: Case) -> None:
    scorer = fedbpt.load_model(repeatable.path, n_threads=1)
    data = texts(repeatable)
    plan = scorer.compile(data, LABELS, "cue")
    for n_prompt in (2, 0, 3, 2):
        embeds = prompts(scorer, 2, n_prompt)
        assert np.array_equal(plan.score(embeds), scorer.score_with_soft_prompt(data, embeds, LABELS, "cue"))


@pytest.mark.parametrize("indices", [[], [24], [-1], [0.5], [[0]]])
def test_invalid_indices_are_refused(repeatable: Case, indices: list[object]) -> None:
    scorer = fedbpt.load_model(repeatable.path, n_threads=1)
    plan = scorer.compile(texts(repeatable), LABELS, "cue")
    with pytest.raises(InputError):
        plan.score(prompts(scorer, 1), indices)


def test_a_negative_budget_is_refused(repeatable: Case) -> None:
    with raises(InputError, field="kv_budget_bytes"):
        fedbpt.load_model(Path(repeatable.path), kv_budget_bytes=-1)


def test_strings_are_tokenised_and_the_cue_follows_each_text(llama: Case) -> None:
    scorer = llama.scorer
    embeds = prompts(scorer, 2, 1)
    cue = scorer.tokenize(" so", add_bos=False)
    spelled = [np.concatenate([scorer.tokenize(text), cue]) for text in ("a b", "c d e")]
    expected = scorer.score_with_soft_prompt(spelled, embeds, LABELS, "cue")
    for given in (" so", cue):
        plan = scorer.compile(["a b", "c d e"], LABELS, "cue", cue=given)
        np.testing.assert_array_equal(plan.score(embeds), expected)


def test_a_string_after_a_prefix_has_no_bos_of_its_own(llama: Case) -> None:
    scorer = llama.scorer
    embeds = prompts(scorer, 2, 1)
    bare = [scorer.tokenize("a b", add_bos=False)]
    expected = scorer.score_with_soft_prompt(bare, embeds, LABELS, "front", prefix=scorer.tokenize("c"))
    actual = scorer.compile(["a b"], LABELS, "front", prefix="c").score(embeds)
    np.testing.assert_array_equal(actual, expected)


def test_an_empty_text_stays_an_error_before_a_cue(llama: Case) -> None:
    with pytest.raises(InputError, match=r"\b1\b"):
        llama.scorer.compile([[5, 6], []], LABELS, "cue", cue=[7, 8])


@pytest.mark.parametrize("placement", ["front", "cue"])
def test_kv_of_eight_bits_only_rounds_logits(case_of, placement: str) -> None:  # type: ignore[no-untyped-def]
    case: Case = case_of("gemma3", "f16")
    wide = fedbpt.load_model(case.path, n_threads=1)
    narrow = fedbpt.load_model(case.path, n_threads=1, kv_type="q8_0")
    data, embeds = texts(case), prompts(wide, 5)
    plans = [scorer.compile(data, LABELS, placement) for scorer in (wide, narrow)]
    exact, rounded = (plan.score(embeds) for plan in plans)
    assert 0 < np.abs(rounded - exact).max() <= 0.05 * np.abs(exact).max()
    np.testing.assert_array_equal(plans[1].score(embeds[3]), rounded[3:4])
    if placement == "cue":
        assert plans[1].kv_bytes < 0.6 * plans[0].kv_bytes


def test_an_unknown_kv_type_is_refused(llama: Case) -> None:
    with raises(InputError, field="kv_type"):
        fedbpt.load_model(llama.path, kv_type="q4_0")  # type: ignore[arg-type]


def test_a_kv_type_whose_blocks_do_not_divide_the_heads_is_refused(case_of) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="f16"):
        fedbpt.load_model(case_of("llama", "f16").path, kv_type="q8_0")
