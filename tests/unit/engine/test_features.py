"""Features of texts, from the toy model's layers."""

from __future__ import annotations

import numpy as np
import pytest

import fedbpt
from fedbpt.engine.layers import default_layers
from fedbpt.errors import InputError
from tests.support.raises import raises
from tests.support.toy_scorer import ToyScorer

TEXTS = [f"row {i}" for i in range(70)]  # more than a call scores at a time


def test_a_row_of_features_is_each_layers_state_over_its_root_mean_square() -> None:
    scorer = ToyScorer()
    found = fedbpt.features(scorer, TEXTS, layers=(0, 1), cue=" =")
    assert found.shape == (70, 2 * scorer.n_embd)
    np.testing.assert_allclose((found.reshape(70, 2, -1) ** 2).mean(axis=2), 1.0)
    one = fedbpt.features(scorer, TEXTS[69:], layers=(1,), cue=" =")
    np.testing.assert_array_equal(one[0], found[69, scorer.n_embd :])


def test_cue_and_prefix_are_read_with_the_text() -> None:
    scorer = ToyScorer()
    plain = fedbpt.features(scorer, ["a"], prefix="Say: ", cue=" =")
    np.testing.assert_array_equal(plain, fedbpt.features(scorer, ["Say: a ="]))
    assert np.abs(plain - fedbpt.features(scorer, ["a"])).max() > 0.01


@pytest.mark.parametrize(("n_layer", "layers"), [(30, (22, 29)), (18, (13, 17)), (2, (1,)), (1, (0,))])
def test_default_layers_are_within_the_model(n_layer: int, layers: tuple[int, ...]) -> None:
    assert default_layers(n_layer) == layers


@pytest.mark.parametrize("layers", [(-1,), (2,), (10**30,), (1, 0), (1, 1), ()])
def test_invalid_layers_are_rejected(layers: tuple[int, ...]) -> None:
    with raises(InputError, field="layers"):
        fedbpt.features(ToyScorer(), ["a"], layers=layers)


def test_an_empty_text_is_named_by_its_place_among_all() -> None:
    with raises(InputError, field="texts") as caught:
        fedbpt.features(ToyScorer(), [*TEXTS, ""])
    assert "text 70 " in str(caught.value)


def test_no_text_is_rejected() -> None:
    with raises(InputError, field="texts"):
        fedbpt.features(ToyScorer(), [])
