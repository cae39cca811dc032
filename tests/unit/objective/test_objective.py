"""Losses of soft prompts on labelled rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbpt.errors import DataError, InputError, ScoringInterrupted, TaskError
from fedbpt.objective.losses import cross_entropy
from fedbpt.objective.objective import CHUNK, Objective
from fedbpt.protocol.specs import Array, LossName, ObjectiveSpec, PromptSpec, Readout, Template
from fedbpt.tasks.rows import batch_indices
from fedbpt.tasks.task import Task, cue_ids, label_word_ids, render_ids
from tests.support.raises import raises
from tests.support.toy_scorer import BOS, ToyScorer

# The toy tokenizer's words share their first byte, the space; these do not.
TEMPLATE = Template(pattern="{text}\nMood: (", label_words=("b", "g"))
LABELS = ("bad", "good")
MOOD = Task(name="mood", labels=LABELS, templates=(TEMPLATE,))
ROWS = [(f"text number {i} {'ugly' * (i % 2)}", i % 2) for i in range(10)]
CUE = PromptSpec(n_prompt=2, d=6, seed=1)
FRONT = PromptSpec(n_prompt=3, d=6, seed=1, placement="front")


def make(
    prompt: PromptSpec = CUE,
    spec: ObjectiveSpec | None = None,
    rows: list[tuple[str, int]] | None = None,
    **more: object,
) -> Objective:
    scorer = more.pop("scorer", None) or ToyScorer()
    return Objective(scorer, TEMPLATE, LABELS, rows or ROWS, spec or ObjectiveSpec(), prompt, **more)


def latents(k: int, d: int = 6) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((k, d))


# --- losses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [CUE, FRONT])
def test_losses_are_those_of_the_scorers_logits(prompt: PromptSpec) -> None:
    objective, scorer = make(prompt), ToyScorer()
    embeds = objective.embeds(latents(3))
    texts = [render_ids(scorer, TEMPLATE, text) for text, _ in ROWS]
    prefix = None
    if prompt is FRONT:
        assert all(text[0] == BOS for text in texts)
        texts, prefix = [text[1:] for text in texts], [BOS]
    words = np.concatenate(label_word_ids(scorer, TEMPLATE, LABELS))
    logits = scorer.score_with_soft_prompt(texts, embeds, words, prompt.placement, prefix)
    expected = cross_entropy(logits, [label for _, label in ROWS])
    np.testing.assert_allclose(objective.losses(embeds), expected.mean(axis=1))
    np.testing.assert_allclose(objective.losses(embeds, [1, 4]), expected[:, [1, 4]].mean(axis=1))


def test_z_zero_in_the_cue_is_the_zero_shot_model() -> None:
    objective, scorer = make(), ToyScorer()
    texts = [render_ids(scorer, TEMPLATE, text) for text, _ in ROWS]
    plain = scorer.score_with_soft_prompt(
        texts, np.zeros((1, 0, 8)), np.concatenate(label_word_ids(scorer, TEMPLATE, LABELS))
    )
    expected = cross_entropy(plain, [label for _, label in ROWS]).sum()
    assert objective.evaluate(objective.embeds(np.zeros((1, 6)))).loss_sums[0] == pytest.approx(expected, abs=0)
    assert objective.evaluate(objective.zero_shot_embeds()).loss_sums[0] == pytest.approx(expected, abs=0)


WORDS = Template(pattern="{text}\nMood: (", label_words=("bad", "brilliant"))


@pytest.mark.parametrize("prompt", [CUE, FRONT])
def test_label_words_of_several_tokens_score_the_sum_of_their_log_probabilities(prompt: PromptSpec) -> None:
    scorer = ToyScorer()
    objective = Objective(scorer, WORDS, LABELS, ROWS, ObjectiveSpec(readout_words=3), prompt)
    embeds = objective.embeds(latents(2))
    logits = objective.logits(embeds[:1], np.arange(len(ROWS)))
    assert logits.shape == (len(ROWS), 2 + 3)
    words = [list(b"bad"), list(b"brilliant")]
    for i, (text, _) in enumerate(ROWS):
        ids = render_ids(scorer, WORDS, text)
        prefix = ids[:1] if prompt is FRONT else None
        [[expected]] = scorer.log_probabilities(
            [ids[1:] if prompt is FRONT else ids], embeds[:1], [words], prompt.placement, prefix
        )
        np.testing.assert_allclose(logits[i, :2], expected, rtol=1e-6)
    found = objective.evaluate(embeds[:1])
    targets = np.array([label for _, label in ROWS])
    assert found.correct[0] == (logits[:, :2].argmax(axis=1) == targets).sum()


def test_zero_shot_in_front_has_no_prompt() -> None:
    objective = make(FRONT)
    assert objective.zero_shot_embeds().shape == (1, 0, 8)
    assert make().evaluate(make().zero_shot_embeds()).loss_sums == pytest.approx(
        objective.evaluate(objective.zero_shot_embeds()).loss_sums
    )


def test_the_cue_starts_from_the_cues_own_last_rows() -> None:
    scorer = ToyScorer()
    own = scorer.token_embeddings(cue_ids(scorer, TEMPLATE)[-2:])
    assert np.array_equal(make().embeds(np.zeros((1, 6)))[0], own)


def test_evaluation_counts_correct_predictions() -> None:
    objective = make()
    found = objective.evaluate(objective.embeds(latents(4)), [0, 1, 2, 3, 9])
    assert found.n == 5
    assert found.predictions.shape == (4, 5)
    truth = np.array([0, 1, 0, 1, 1])
    assert found.correct == tuple((found.predictions == truth).sum(axis=1))
    assert found.accuracy == tuple(c / 5 for c in found.correct)


def test_all_candidates_share_every_scoring_call() -> None:
    scorer = ToyScorer()
    objective = make(rows=ROWS * 15, scorer=scorer)
    objective.losses(objective.embeds(latents(3)))
    assert scorer.calls == [(3, CHUNK), (3, CHUNK), (3, 150 - 2 * CHUNK)]


def test_a_label_bias_moves_predictions() -> None:
    objective = make()
    objective.readout = Readout(weights=Array.of(np.array([[1e3, 0.0]])))
    assert objective.evaluate(objective.zero_shot_embeds()).correct == (5,)
    assert (objective.evaluate(objective.zero_shot_embeds()).predictions == 0).all()


def test_the_hinge_loss_is_used_if_requested() -> None:
    embeds = make().embeds(latents(2))
    assert not np.allclose(make().losses(embeds), make(spec=ObjectiveSpec(loss="hinge")).losses(embeds))


# --- the perturbed ratio -------------------------------------------------------------------------------------------


def test_the_perturbed_objective_is_a_ratio() -> None:
    spec = ObjectiveSpec(perturb=0.5)
    objective, plain = make(spec=spec), make()
    embeds = objective.embeds(latents(2))
    ratio = objective.losses(embeds, rng=np.random.default_rng(3))
    perturbed = plain.losses(embeds) / ratio
    assert not np.allclose(perturbed, plain.losses(embeds))
    assert np.array_equal(ratio, objective.losses(embeds, rng=np.random.default_rng(3)))


def test_a_tiny_perturbation_rate_gives_a_ratio_of_one() -> None:
    objective = make(spec=ObjectiveSpec(perturb=1e-9))
    np.testing.assert_allclose(objective.losses(objective.embeds(latents(2)), rng=np.random.default_rng(0)), 1.0)


def test_a_prompt_in_front_can_be_perturbed() -> None:
    objective = make(FRONT, ObjectiveSpec(perturb=1.0))
    assert np.isfinite(objective.losses(objective.embeds(latents(2)), rng=np.random.default_rng(0))).all()


def test_the_perturbed_objective_needs_a_generator() -> None:
    objective = make(spec=ObjectiveSpec(perturb=0.5))
    with raises(InputError, field="rng"):
        objective.losses(objective.embeds(latents(1)))


# --- counting, progress, cancelling --------------------------------------------------------------------------------


def test_tokens_in_the_cue_count_each_text_once() -> None:
    objective, scorer = make(), ToyScorer()
    lengths = [len(render_ids(scorer, TEMPLATE, text)) for text, _ in ROWS]
    objective.losses(objective.embeds(latents(3)), [0, 1])
    assert objective.tokens == sum(lengths[:2]) - 2 * 2 + 3 * 2 * 2
    objective.losses(objective.embeds(latents(3)), [0, 1])
    assert objective.tokens == sum(lengths[:2]) - 2 * 2 + 2 * 3 * 2 * 2
    assert objective.evaluations == 6


def test_tokens_in_front_count_every_time() -> None:
    objective, scorer = make(FRONT), ToyScorer()
    lengths = [len(render_ids(scorer, TEMPLATE, text)) - 1 for text, _ in ROWS]
    for _ in range(2):
        objective.losses(objective.embeds(latents(4)), [2, 3])
    assert objective.tokens == 2 * 4 * (3 + sum(lengths[2:4]))


def test_progress_counts_rows() -> None:
    seen: list[tuple[int, int]] = []
    objective = make(rows=ROWS * 10, spec=ObjectiveSpec(perturb=0.3))
    embeds = objective.embeds(latents(1))
    objective.losses(embeds, rng=np.random.default_rng(0), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(64, 200), (100, 200), (164, 200), (200, 200)]


def test_cancelling_stops_between_chunks() -> None:
    scorer = ToyScorer()
    objective = make(rows=ROWS * 20, scorer=scorer)
    with pytest.raises(ScoringInterrupted):
        objective.losses(objective.embeds(latents(1)), cancelled=lambda: len(scorer.calls) == 2)
    assert len(scorer.calls) == 2


# --- refusals ------------------------------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_cue_is_refused_with_the_limit() -> None:
    n = len(cue_ids(ToyScorer(), TEMPLATE))
    with raises(TaskError, field="n_prompt", limit=n):
        make(PromptSpec(n_prompt=n + 1, d=6))
    make(PromptSpec(n_prompt=n, d=6))


@pytest.mark.parametrize("rows", [[("fine", 2)], [("fine", -1)]])
def test_a_label_out_of_range_is_refused(rows: list[tuple[str, int]]) -> None:
    with raises(DataError, field="label"):
        make(rows=rows)


def test_no_rows_are_refused() -> None:
    with pytest.raises(DataError):
        Objective(ToyScorer(), TEMPLATE, LABELS, [], ObjectiveSpec(), CUE)


@pytest.mark.parametrize("indices", [[], [10], [-1], [[0]]])
def test_bad_indices_are_refused(indices: list) -> None:
    with pytest.raises(InputError):
        make().losses(make().zero_shot_embeds(), indices)


def test_a_two_dimensional_prompt_is_refused() -> None:
    with pytest.raises(InputError):
        make().losses(np.zeros((2, 8)))


# --- mini-batches and artefacts ------------------------------------------------------------------------------------


@given(n=st.integers(1, 50), size=st.integers(0, 60), seed=st.integers(0, 100))
def test_a_mini_batch_is_distinct_rows(n: int, size: int, seed: int) -> None:
    chosen = batch_indices(n, size, np.random.default_rng(seed))
    assert len(chosen) == (n if size == 0 else min(n, size))
    assert (np.diff(chosen) > 0).all()
    assert chosen[0] >= 0
    assert chosen[-1] < n


@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=5).filter(any),
    size=st.integers(1, 60),
    seed=st.integers(0, 100),
)
def test_labels_are_in_a_mini_batch_in_proportion(counts: list[int], size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    targets = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    n = len(targets)
    chosen = batch_indices(n, size, rng, targets)
    assert len(chosen) == min(n, size)
    assert (np.diff(chosen) > 0).all()
    assert 0 <= chosen[0] <= chosen[-1] < n
    found = np.bincount(targets[chosen], minlength=len(counts))
    assert (np.abs(found - np.array(counts) * len(chosen) / n) < 1 + 1e-9).all()


def test_every_row_is_in_a_mini_batch_equally_often() -> None:
    rng, draws = np.random.default_rng(0), 6000
    targets = np.array([0] * 7 + [1] * 3 + [2])
    times = np.zeros(11)
    for _ in range(draws):
        times[batch_indices(11, 4, rng, targets)] += 1
    spread = np.sqrt(draws * 4 / 11 * 7 / 11)
    assert np.abs(times - draws * 4 / 11).max() < 4 * spread


def test_stratification_reduces_the_noise_of_a_mean() -> None:
    rng = np.random.default_rng(0)
    targets = np.arange(40) % 2
    values = 5.0 * targets + rng.standard_normal(40)
    plain, even = (
        np.std([values[batch_indices(40, 8, rng, given_targets)].mean() for _ in range(300)])
        for given_targets in (None, targets)
    )
    assert even < 0.5 * plain


def test_a_latent_becomes_a_prompt() -> None:
    objective = make()
    z = latents(1)[0]
    prompt = objective.as_prompt(z, MOOD, ({"round": 3},))
    assert prompt.task == MOOD
    assert np.array_equal(prompt.rows, objective.embeds(z[None])[0])
    assert prompt.history == ({"round": 3},)
    prompt.check(ToyScorer())


def test_rows_are_drawn_in_proportion_to_their_weight() -> None:
    rng, draws = np.random.default_rng(0), 6000
    targets = np.array([0] * 7 + [1] * 3 + [2])
    weights = np.array([1.0] * 7 + [2.0] * 3 + [11.0])  # the last: 11 of 24, in 4 places at least once
    times, labels = np.zeros(11), []
    for _ in range(draws):
        chosen = batch_indices(11, 4, rng, targets, weights)
        times += np.bincount(chosen, minlength=11)
        labels.append(np.bincount(targets[chosen], minlength=3))
    expected = draws * 4 * weights / 24
    assert (np.abs(times - expected) < 4 * np.sqrt(expected)).all()
    assert np.min(labels, axis=0).tolist() == [1, 1, 1]
    assert np.max(labels, axis=0).tolist() == [2, 1, 2]


def test_equal_weights_draw_the_same_rows_as_none() -> None:
    targets = np.arange(30) % 4
    for seed in range(20):
        plain = batch_indices(30, 7, np.random.default_rng(seed), targets)
        weighted = batch_indices(30, 7, np.random.default_rng(seed), targets, np.ones(30))
        np.testing.assert_array_equal(plain, weighted)


@pytest.mark.parametrize("loss", ["cross_entropy", "hinge"])
def test_row_weights_scale_losses_but_not_correct_predictions(loss: LossName) -> None:
    objective = make(spec=ObjectiveSpec(loss=loss))
    embeds = objective.embeds(latents(3))
    rows = np.array([objective.losses(embeds, [i]) for i in range(len(objective))])
    plain = objective.evaluate(embeds)
    weights = np.linspace(0.5, 3, len(objective))
    np.testing.assert_allclose(objective.losses(embeds, row_weights=weights), (rows.T * weights).mean(axis=1))
    found = objective.evaluate(embeds, row_weights=weights)
    np.testing.assert_allclose(found.loss_sums, (rows.T * weights).sum(axis=1))
    assert found.correct == plain.correct
