"""Logits of label words equal those of the whole output layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import tiny_gguf
from tiny_case import Case

LABELS = [259, 3, 411]
PICKED = 1e-6  # the whole layer is computed, with the same results
HEAD_F32 = 1e-4  # another order of summation
HEAD_QUANTISED = 0.15  # the whole layer rounds its input to 8 bits, the head does not


def logits(case: Case, label_ids: list[int] | None, placement: str = "cue") -> np.ndarray:
    found: np.ndarray = case.scorer.score_with_soft_prompt(
        case.texts([9, 40, 3]), case.prompts(3, 2), label_ids, placement
    )
    return found


@pytest.mark.parametrize("placement", ["front", "cue"])
def test_label_logits_are_columns_of_all_logits(case: Case, placement: str) -> None:
    wide = logits(case, None, placement)[..., LABELS]
    assert np.abs(logits(case, LABELS, placement) - wide).max() <= HEAD_F32


@pytest.mark.parametrize("name", ["llama", "llama-bpe", "qwen2", "gemma3"])
@pytest.mark.parametrize("weights", ["f16", "q8_0", "q4_1"])
def test_quantised_label_logits_differ_only_by_rounding(case_of: Callable[..., Case], name: str, weights: str) -> None:
    case = case_of(name, weights)
    assert np.abs(logits(case, LABELS) - logits(case, None)[..., LABELS]).max() <= HEAD_QUANTISED


def test_an_output_bias_counts(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = replace(tiny_gguf.QWEN2, output_bias=True)
    case = Case(model, tiny_gguf.write(tmp_path_factory.mktemp("bias") / "qwen2-bias.gguf", model))
    narrow, wide = logits(case, LABELS), logits(case, None)
    assert np.abs(narrow - wide[..., LABELS]).max() <= PICKED
    truth = case.reference.score(case.texts([9, 40, 3]), case.prompts(3, 2), LABELS, "cue")
    assert np.abs(narrow - truth).max() <= 1e-3


def test_other_labels_from_call_to_call_do_not_mix(llama: Case) -> None:
    first, other, wide = logits(llama, LABELS), logits(llama, [7, 8]), logits(llama, None)
    assert other.shape[-1] == 2
    assert np.abs(other - wide[..., [7, 8]]).max() <= HEAD_F32
    assert np.array_equal(logits(llama, LABELS), first)


def test_a_label_may_be_given_twice(llama: Case) -> None:
    twice = logits(llama, [5, 5])
    assert np.array_equal(twice[..., 0], twice[..., 1])
