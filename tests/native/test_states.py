"""States of layers beside what else a plan gives: continuations, no logits, no prompt, a part of the texts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tiny_case import Case

from fedbpt.errors import InputError

LAYERS = (0, 1)
LABELS = [259, 3, 411]


@pytest.mark.parametrize("placement", ["front", "cue"])
@pytest.mark.parametrize("weights", ["f16", "q8_0"])
def test_states_do_not_depend_on_what_else_is_computed(
    case_of: Callable[..., Case], weights: str, placement: str
) -> None:
    case = case_of("llama", weights)
    texts = case.texts([5, 40, 9, 17, 6])
    embeds = case.prompts(3, 2)
    with_labels = case.scorer.compile(texts, LABELS, placement, layers=LAYERS).states(embeds=embeds)
    only_states = case.scorer.compile(texts, [], placement, layers=LAYERS)
    np.testing.assert_array_equal(only_states.states(embeds=embeds), with_labels)
    np.testing.assert_array_equal(only_states.states([3, 1], embeds), with_labels[:, [3, 1]])
    assert only_states.score(embeds).shape == (3, 5, 0)
    follow = [[[7], [8, 9, 10]]] * len(texts)
    beside = case.scorer.compile(texts, None, placement, continuations=follow, layers=LAYERS)
    logits, states = beside.score_states(embeds)
    assert np.abs(states - with_labels).max() <= 0.05 * with_labels.std()  # other batches: up to rounding
    np.testing.assert_array_equal(logits, beside.score(embeds))


def test_without_a_prompt_both_placements_read_the_same(case_of: Callable[..., Case]) -> None:
    case = case_of("llama", "f32")
    texts = case.texts([5, 40, 9])
    front, cue = (case.scorer.compile(texts, [], place, layers=LAYERS).states() for place in ("front", "cue"))
    assert front.shape == (3, 2, case.scorer.n_embd)
    np.testing.assert_allclose(front, cue, atol=1e-3 * float(front.std()))


def test_a_plan_without_layers_gives_no_states(case_of: Callable[..., Case]) -> None:
    case = case_of("llama", "f32")
    with pytest.raises(InputError) as caught:
        case.scorer.compile(case.texts([5]), LABELS).states()
    assert caught.value.field == "layers"


def test_a_huge_prompt_does_not_affect_later_states(case_of: Callable[..., Case]) -> None:
    case = case_of("llama", "f16")
    plan = case.scorer.compile(case.texts([5, 40]), [], "cue", layers=LAYERS)
    embeds = case.prompts(1, 2)
    expected = plan.states(embeds=embeds)
    assert np.abs(plan.states(embeds=np.full_like(embeds, 3e38)) - expected).max() > 1e30
    np.testing.assert_array_equal(plan.states(embeds=embeds), expected)
