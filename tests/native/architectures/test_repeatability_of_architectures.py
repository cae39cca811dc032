"""Reproducibility as stated in docs/engine.md, for every architecture, with weights whose rounding shows any change."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from table import ARCHITECTURES
from tiny_case import N_THREADS, Case

import fedbpt

LABELS = [259, 3, 411]
PLACEMENTS = ["front", "cue"]


@pytest.fixture(params=list(ARCHITECTURES))
def quantized(request: pytest.FixtureRequest, architecture_case: Callable[..., Case]) -> Case:
    return architecture_case(request.param, "q8_0")


def test_the_order_and_number_of_candidates_and_earlier_calls_change_no_bit(quantized: Case) -> None:
    texts, embeds = quantized.texts([9, 31, 50]), quantized.prompts(9, 3)
    order = np.random.default_rng(0).permutation(9)
    for placement in PLACEMENTS:
        how = {"label_ids": LABELS, "placement": placement, "prefix": [1, 44]}
        together = quantized.scorer.score_with_soft_prompt(texts, embeds, **how)
        np.testing.assert_array_equal(
            quantized.scorer.score_with_soft_prompt(texts, embeds[order], **how), together[order]
        )
        for first, last in ((0, 1), (3, 8)):
            some = quantized.scorer.score_with_soft_prompt(texts, embeds[first:last], **how)
            np.testing.assert_array_equal(some, together[first:last])
        quantized.scorer.score_with_soft_prompt(
            quantized.texts([400, 50]), quantized.prompts(2, 40), placement=placement
        )
        np.testing.assert_array_equal(quantized.scorer.score_with_soft_prompt(texts, embeds, **how), together)


def test_other_texts_change_no_bit_of_a_text_in_the_cue_and_little_in_front(quantized: Case) -> None:
    texts, embeds = quantized.texts([9, 31, 50, 200]), quantized.prompts(2, 3)
    spread = quantized.reference.logits(quantized.ids(64)).std()
    for placement, most in (("front", 0.05 * spread), ("cue", 0.0)):
        together = quantized.scorer.score_with_soft_prompt(texts, embeds, LABELS, placement)
        for i, text in enumerate(texts):
            alone = quantized.scorer.score_with_soft_prompt([text], embeds, LABELS, placement)
            assert np.abs(alone[:, 0] - together[:, i]).max() <= most


def test_a_candidate_that_resumes_from_a_layer_has_the_bits_of_one_that_runs_all(quantized: Case) -> None:
    """Where states are asked for too, all layers run."""
    scorer, texts, rows = quantized.scorer, quantized.texts([9, 31, 50]), quantized.prompts(9, 1)
    for layer in range(scorer.n_layer - 1):
        whole, _ = scorer.compile(texts, LABELS, "layer", layer=layer, layers=[layer]).score_states(rows)
        plan = scorer.compile(texts, LABELS, "layer", layer=layer)
        np.testing.assert_array_equal(plan.score(rows), whole)
        before = plan.n_tokens
        np.testing.assert_array_equal(plan.score(rows), whole)
        ran = (plan.n_tokens - before) * scorer.n_layer
        resumed = 9 * len(texts) * (scorer.n_layer - 1 - layer)
        # Some later layers of HRM read what earlier ones wrote at the same token: then all run.
        possible = (resumed, 9 * len(texts) * scorer.n_layer) if scorer.architecture == "hrm_text" else (resumed,)
        assert any(abs(ran - expected) <= scorer.n_layer for expected in possible)
        some, _ = scorer.compile(texts, LABELS, "layer", layer=layer, layers=[layer]).score_states(rows[2:3], [2, 0])
        np.testing.assert_array_equal(plan.score(rows[2:3], [2, 0]), some)  # in other cells of the cache


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_half_precision_scores_as_the_model_up_to_rounding(architecture_case: Callable[..., Case], name: str) -> None:
    """The weights are equal, but attention is the fork's own. In a mixture, rounding may select another expert."""
    case = architecture_case(name, "f16")
    texts, no_prompt = case.texts([5, 20, 25, 40, 60]), np.zeros((1, 0, case.model.n_embd), np.float32)
    scored = case.scorer.score_with_soft_prompt(texts, no_prompt)
    expected = case.reference.score(texts, no_prompt)
    errors = np.abs(scored - expected)[0].max(axis=1) / expected.std()
    assert np.median(errors) <= 0.02


@pytest.mark.parametrize("weights", ["f16", "q8_0"])
@pytest.mark.parametrize("name", ["gptneox", "gpt2", "bloom", "phi2", "starcoder2", "gpt-oss", "llama"])
def test_float32_biases_do_not_make_a_float32_model(
    architecture_case: Callable[..., Case], name: str, weights: str
) -> None:
    """In some architectures most tensors are vectors, which are float32 in every file."""
    memory = {}
    for kind in ("f32", weights):
        scorer = fedbpt.load_model(architecture_case(name, kind).path, n_threads=N_THREADS)
        scorer.score_with_soft_prompt([np.arange(3, 9)], np.zeros((1, 0, scorer.n_embd), np.float32), LABELS)
        memory[kind] = scorer.memory()["kv"]
    assert memory[weights] <= memory["f32"] / 2
