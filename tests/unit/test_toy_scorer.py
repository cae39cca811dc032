"""The toy model fulfils the `Scorer` protocol as far as other tests rely on it."""

from __future__ import annotations

import numpy as np
import pytest

from fedbpt.engine.scorer import Scorer
from fedbpt.errors import InputError
from tests.support.toy_scorer import ToyScorer

TEXTS = [[1, 2, 3], [256, 7], list(range(40))]


def test_it_is_a_scorer() -> None:
    assert isinstance(ToyScorer(), Scorer)


@pytest.mark.parametrize("placement", ["front", "cue"])
def test_a_result_does_not_depend_on_the_rest_of_the_call(placement: str) -> None:
    scorer = ToyScorer()
    embeds = np.random.default_rng(0).standard_normal((4, 2, 8))
    together = scorer.score_with_soft_prompt(TEXTS, embeds, [5, 6], placement)
    alone = scorer.score_with_soft_prompt(TEXTS[1:2], embeds[2:3], [5, 6], placement)
    assert np.array_equal(together[2, 1], alone[0, 0])


def test_the_texts_own_embeddings_in_the_cue_change_nothing() -> None:
    scorer = ToyScorer()
    own = scorer.token_embeddings([8, 9])
    texts = [[1, 8, 9], [3, 4, 8, 9]]
    plain = scorer.score_with_soft_prompt(texts, np.zeros((1, 0, 8)))
    assert np.array_equal(scorer.score_with_soft_prompt(texts, own, None, "cue"), plain)


@pytest.mark.parametrize(
    ("tokens", "embeds"),
    [
        ([[]], np.zeros((1, 1, 8))),
        ([[257]], np.zeros((1, 1, 8))),
        ([[1]], np.zeros((1, 1, 7))),
        ([[1]], np.full((1, 1, 8), np.nan)),
    ],
)
def test_bad_input_is_refused(tokens: list[list[int]], embeds: np.ndarray) -> None:
    with pytest.raises(InputError):
        ToyScorer().score_with_soft_prompt(tokens, embeds)
