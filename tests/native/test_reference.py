"""The reference itself: properties of every causal language model, whatever its weights."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import pytest
from tiny_case import Case


def test_logits_depend_on_nothing_that_comes_later(case: Case) -> None:
    tokens = case.ids(30)
    np.testing.assert_allclose(case.reference.logits(tokens)[:20], case.reference.logits(tokens[:20]), atol=1e-9)


def test_rows_and_tokens_give_the_same_logits(case: Case) -> None:
    tokens = case.ids(12)
    rows = case.reference.token_embeddings(tokens)
    np.testing.assert_array_equal(case.reference.logits(rows), case.reference.logits(tokens))


def test_the_order_of_earlier_tokens_matters(case: Case) -> None:
    tokens = case.ids(12)
    swapped = tokens[[1, 0, *range(2, 12)]]
    assert np.abs(case.reference.logits(tokens)[-1] - case.reference.logits(swapped)[-1]).max() > 0.05


def test_logits_spread_wide_enough_for_errors_to_show(case: Case) -> None:
    assert 2 < case.reference.logits(case.ids(64)).std() < 5


@pytest.mark.parametrize("weights", ["f16", "q8_0", "q4_1"])
def test_quantised_files_hold_the_weights_up_to_rounding(case_of: Callable[..., Case], weights: str) -> None:
    case = case_of("llama", weights)
    types = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(case.path).tensors}
    assert types["blk.0.ffn_down.weight"] == gguf.GGMLQuantizationType[weights.upper()]
    assert types["output_norm.weight"] == gguf.GGMLQuantizationType.F32
