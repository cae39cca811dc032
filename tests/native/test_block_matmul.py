"""Products of Q4_1 matrices by tiles: any number of rows and columns, and long rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf
from tiny_case import Case

# K and V have 24 rows, no multiple of a tile's 16; the second product of the feed-forward part is over 2,080 numbers,
# more than are unpacked at a time.
MODEL = replace(tiny_gguf.LLAMA, n_layer=2, n_head_kv=1, head_dim=24, n_ff=2080, n_ctx=1024, weights="q4_1")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Case:
    path: Path = tmp_path_factory.mktemp("odd") / "odd.gguf"
    return Case(MODEL, tiny_gguf.write(path, MODEL))


def test_products_match_up_to_the_rounding_of_activations(odd: Case) -> None:
    texts, embeds = odd.texts([1, 2, 40, 9, 150]), odd.prompts(2, 3)
    difference = np.abs(odd.scorer.score_with_soft_prompt(texts, embeds) - odd.reference.score(texts, embeds))
    assert difference.max() <= 1.0
    assert difference.mean() <= 0.12


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 9, 127, 128, 129])
def test_a_column_has_the_same_bits_whatever_is_beside_it(odd: Case, n: int) -> None:
    text, embeds = odd.texts([6]), odd.prompts(130, 1)
    together = odd.scorer.score_with_soft_prompt(text, embeds, placement="cue")
    some = odd.scorer.score_with_soft_prompt(text, embeds[:n], placement="cue")
    np.testing.assert_array_equal(some, together[:n])
