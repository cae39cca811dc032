"""Scores on a GPU match numpy: soft prompts, shared prefix, kept KV, label head and continuations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tiny_case import N_THREADS, Case

import fedbpt
from fedbpt.engine.native_scorer import NativeScorer
from fedbpt.errors import InputError

GPUS = fedbpt.gpus()
needs_gpu = pytest.mark.skipif(not GPUS, reason="this build finds no GPU: docs/backends.md says how to build for one")
needs_none = pytest.mark.skipif(bool(GPUS), reason="about machines without a GPU")

TOLERANCE = {"f32": 0.05, "f16": 0.15, "q8_0": 0.15}
"""max |Δlogit| from numpy, of logits that spread over ten units: GPUs round f32 products to f16. With q8_0 the CPU
itself is up to 0.5 off, since it rounds activations to 8 bits."""
LABELS = [259, 3, 411]


@pytest.fixture(scope="module")
def on_gpu() -> Callable[..., NativeScorer]:
    """``on_gpu(case, n_gpu_layers=-1)``: the case's model, loaded once each."""
    made: dict[tuple[Any, ...], NativeScorer] = {}

    def get(case: Case, n_gpu_layers: int = -1, gpu: str | None = None) -> NativeScorer:
        key = case.path, n_gpu_layers, gpu
        if key not in made:
            made[key] = fedbpt.load_model(case.path, N_THREADS, n_gpu_layers, gpu=gpu)
        return made[key]

    return get


def largest_difference(case: Case, scorer: NativeScorer, lengths: list[int], n_prompt: int, **how: Any) -> float:
    """max |Δlogit| between ``scorer`` and numpy."""
    texts, embeds = case.texts(lengths), case.prompts(5 if n_prompt else 1, n_prompt)
    found = scorer.score_with_soft_prompt(texts, embeds, **how)
    return float(np.abs(found - case.reference.score(texts, embeds, **how)).max())


@needs_gpu
@pytest.mark.parametrize("label_ids", [LABELS, None])
@pytest.mark.parametrize("placement", ["front", "cue"])
@pytest.mark.parametrize("weights", list(TOLERANCE))
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_logits_are_those_of_numpy(
    case_of: Callable[..., Case],
    on_gpu: Callable[..., NativeScorer],
    name: str,
    weights: str,
    placement: str,
    label_ids: list[int] | None,
) -> None:
    case = case_of(name, weights)
    how = {"label_ids": label_ids, "placement": placement, "prefix": case.ids(7, seed=9)}
    for n_prompt in (3, 0):
        assert largest_difference(case, on_gpu(case), [9, 70, 3, 31], n_prompt, **how) <= TOLERANCE[weights]


@needs_gpu
@pytest.mark.parametrize("placement", ["front", "cue"])
def test_attention_windows_and_a_scale_of_embeddings_are_kept(
    case_of: Callable[..., Case], on_gpu: Callable[..., NativeScorer], placement: str
) -> None:
    case = case_of("gemma3", "q8_0")
    how = {"label_ids": LABELS, "placement": placement}
    assert largest_difference(case, on_gpu(case), [9, 70], 2, **how) <= TOLERANCE["q8_0"]


@needs_gpu
def test_a_plan_keeps_its_texts_and_repeats_its_scores(
    case_of: Callable[..., Case], on_gpu: Callable[..., NativeScorer]
) -> None:
    case = case_of("llama", "q8_0")
    texts, embeds = case.texts([20, 33, 8]), case.prompts(4, 1)
    plan = on_gpu(case).compile(texts, LABELS, "cue")
    first, again = plan.score(embeds), plan.score(embeds)
    assert np.array_equal(first, again)
    assert plan.n_kept == 3
    assert np.abs(first - case.reference.score(texts, embeds, LABELS, "cue")).max() <= TOLERANCE["q8_0"]


@needs_gpu
def test_continuations_match_the_cpus(case_of: Callable[..., Case], on_gpu: Callable[..., NativeScorer]) -> None:
    case = case_of("llama", "f16")
    continuations = [[case.ids(3, seed=text), case.ids(1, seed=text)] for text in range(2)]
    here, there = (
        scorer.compile(case.texts([9, 14]), [], "cue", continuations=continuations).score(case.prompts(2, 1))
        for scorer in (case.scorer, on_gpu(case))
    )
    assert np.abs(here - there).max() <= TOLERANCE["f16"]


@needs_gpu
def test_some_layers_on_the_gpu_give_the_same_scores(
    case_of: Callable[..., Case], on_gpu: Callable[..., NativeScorer]
) -> None:
    case = case_of("llama", "q8_0")
    assert largest_difference(case, on_gpu(case, 1), [9, 14], 2, label_ids=LABELS) <= TOLERANCE["q8_0"]


@needs_gpu
def test_a_gpu_is_chosen_by_name_and_its_memory_reported(
    case_of: Callable[..., Case], on_gpu: Callable[..., NativeScorer]
) -> None:
    case = case_of("llama", "q8_0")
    scorer = on_gpu(case, gpu=GPUS[0].name)
    assert scorer.backend == f"{GPUS[0].name} (all layers)"
    for each in (scorer, case.scorer):
        each.score_with_soft_prompt(case.texts([9]), case.prompts(1, 1), LABELS)
    assert 0.3 * case.path.stat().st_size < scorer.memory()["gpu"]
    assert case.scorer.memory()["gpu"] == 0
    assert 0 < GPUS[0].free_bytes <= GPUS[0].memory_bytes


@needs_gpu
def test_an_unknown_gpu_is_refused_with_the_known_ones(llama: Case) -> None:
    with pytest.raises(InputError) as refused:
        fedbpt.load_model(llama.path, N_THREADS, -1, gpu="Abacus7")
    assert [name for name in ("'Abacus7'", GPUS[0].name) if name not in str(refused.value)] == []


@needs_gpu
def test_a_named_gpu_without_layers_is_refused(llama: Case) -> None:
    with pytest.raises(InputError, match="n_gpu_layers"):
        fedbpt.load_model(llama.path, N_THREADS, gpu=GPUS[0].name)


@needs_none
@pytest.mark.parametrize("n_gpu_layers", [1, -1])
def test_gpu_layers_are_refused_without_a_gpu(llama: Case, n_gpu_layers: int) -> None:
    with pytest.raises(InputError, match=f"n_gpu_layers.*{n_gpu_layers}"):
        fedbpt.load_model(llama.path, N_THREADS, n_gpu_layers)
