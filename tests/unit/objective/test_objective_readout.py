"""An objective whose label logits a readout corrects."""

from __future__ import annotations

import numpy as np
import pytest

from fedbpt.errors import InputError
from fedbpt.objective.losses import cross_entropy
from fedbpt.objective.readout import read
from fedbpt.protocol.specs import Array, ObjectiveSpec, PromptSpec, Readout
from tests.support.raises import raises
from tests.support.toy_scorer import ToyScorer
from tests.unit.objective.test_objective import CUE, FRONT, MOOD, latents, make


def readout(rows: int, seed: int = 0) -> Readout:
    return Readout(weights=Array.of(np.random.default_rng(seed).standard_normal((rows, 2))))


def test_losses_and_predictions_use_the_readout() -> None:
    objective = make(spec=ObjectiveSpec(readout_words=5))
    embeds = objective.embeds(latents(2))
    objective.readout = readout(6)
    raw = np.stack([objective.logits(one[None], np.arange(10)) for one in embeds])
    assert raw.shape == (2, 10, 2 + 5)
    logits = read(raw, objective.readout.weights.numpy())
    np.testing.assert_allclose(objective.losses(embeds), cross_entropy(logits, objective.targets).mean(axis=1))
    assert (objective.evaluate(embeds).predictions == logits.argmax(axis=2)).all()


def test_the_words_of_an_objective_change_nothing_until_a_readout_uses_them() -> None:
    plain, with_words = make(spec=ObjectiveSpec(readout_words=0)), make(spec=ObjectiveSpec(readout_words=7))
    embeds = plain.embeds(latents(3))
    assert (len(plain.word_ids), len(with_words.word_ids)) == (0, 7)
    assert not set(with_words.word_ids.tolist()) & set(np.concatenate(with_words.label_word_ids).tolist())
    assert plain.losses(embeds).tobytes() == with_words.losses(embeds).tobytes()


@pytest.mark.parametrize("prompt", [CUE, FRONT])
def test_candidates_that_differ_only_in_the_readout_are_scored_once(prompt: PromptSpec) -> None:
    scorer = ToyScorer()
    objective = make(prompt, ObjectiveSpec(readout_words=5), scorer=scorer)
    one, other = objective.embeds(latents(2))
    together, readouts = np.stack([other, one, other, one]), (None, readout(6), readout(3), readout(1))
    found = objective.evaluate(together, readouts=readouts)
    assert scorer.calls == [(2, 10)]
    for i, own in enumerate(readouts):
        objective.readout = own
        alone = objective.evaluate(together[i : i + 1])
        assert found.correct[i] == alone.correct[0]
        assert found.loss_sums[i] == pytest.approx(alone.loss_sums[0], rel=1e-12)
        assert (found.predictions[i] == alone.predictions[0]).all()


def test_one_readout_for_each_candidate_or_none() -> None:
    objective = make(spec=ObjectiveSpec(readout_words=5))
    with raises(InputError, field="readouts"):
        objective.evaluate(objective.embeds(latents(2)), readouts=(None,))
    with raises(InputError, field="readout", limit=5):
        objective.evaluate(objective.embeds(latents(1)), readouts=(readout(7),))


def test_a_latent_becomes_a_prompt_with_its_readout() -> None:
    objective = make(spec=ObjectiveSpec(readout_words=5))
    objective.readout = readout(1)
    biased = objective.as_prompt(latents(1)[0], MOOD)
    np.testing.assert_allclose(biased.label_bias, objective.readout.weights.numpy()[0], rtol=1e-6)
    assert (len(biased.word_ids), biased.word_weights.shape) == (0, (0, 2))
    objective.readout = readout(6)
    full = objective.as_prompt(latents(1)[0], MOOD)
    assert full.word_ids.tolist() == objective.word_ids.tolist()
    np.testing.assert_allclose(full.readout.weights.numpy(), objective.readout.weights.numpy(), rtol=1e-6)
