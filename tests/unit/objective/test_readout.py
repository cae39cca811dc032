"""The readout: its words, their weights, and the results that a device sends to fit it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbpt.errors import InputError
from fedbpt.objective.losses import cross_entropy
from fedbpt.objective.readout import (
    blocks,
    ensemble,
    fit_result,
    full_weights,
    loss_and_gradient,
    moments,
    read,
    word_ids,
)
from fedbpt.protocol.rounds import FitWork
from fedbpt.protocol.specs import Array, Readout, Template
from tests.support.raises import raises

N_LABELS, N_WORDS = 3, 5
LABEL_IDS = np.array([4, 0, 9], dtype=np.int32)


def made_up(n: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits [n, N_LABELS + N_WORDS] as a scorer gives them, targets and weights."""
    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal((n, N_LABELS + N_WORDS))).astype(np.float32)
    return logits, rng.integers(0, N_LABELS, n), 0.3 * rng.standard_normal((1 + N_WORDS, N_LABELS))


def readout(weights: np.ndarray) -> Readout:
    return Readout(weights=Array.of(weights))


# --- which words ---------------------------------------------------------------------------------------------------


def test_a_seed_chooses_the_words_and_another_seed_others() -> None:
    first, again, other = (word_ids(1000, 32, seed, LABEL_IDS) for seed in (1, 1, 2))
    assert first.dtype == np.int32
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()


def test_fewer_words_are_the_first_of_more() -> None:
    assert word_ids(1000, 8, 1, LABEL_IDS).tolist() == word_ids(1000, 32, 1, LABEL_IDS)[:8].tolist()


@given(n_vocab=st.integers(11, 60), n_words=st.integers(0, 40), seed=st.integers(0, 20))
def test_words_exclude_label_words_and_differ_if_the_vocabulary_suffices(n_vocab: int, n_words: int, seed: int) -> None:
    words = word_ids(n_vocab, n_words, seed, LABEL_IDS)
    assert words.shape == (n_words,)
    assert not set(words.tolist()) & set(LABEL_IDS.tolist())
    assert set(words.tolist()) <= set(range(n_vocab))
    assert len(set(words.tolist())) == min(n_words, n_vocab - len(LABEL_IDS))


def test_a_small_vocabulary_repeats_its_own_words_in_the_same_order() -> None:
    words = word_ids(10, 21, 0, LABEL_IDS).tolist()
    assert words == words[:7] * 3


# --- weights -------------------------------------------------------------------------------------------------------


def test_no_readout_is_zeros() -> None:
    assert full_weights(None, 2, 3).tolist() == np.zeros((3, 3)).tolist()


@pytest.mark.parametrize("n_rows", [1, 3, 1 + N_WORDS])
def test_words_that_a_readout_does_not_use_weigh_nothing(n_rows: int) -> None:
    given_rows = np.random.default_rng(0).standard_normal((n_rows, N_LABELS))
    full = full_weights(readout(given_rows), N_WORDS, N_LABELS)
    assert full.shape == (1 + N_WORDS, N_LABELS)
    assert full[:n_rows].tolist() == given_rows.tolist()
    assert not full[n_rows:].any()


@pytest.mark.parametrize("shape", [(0, 3), (3,), (1, 2), (1, 4), (7, 3), (1, 3, 1), ()])
def test_weights_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with raises(InputError, field="readout", limit=N_WORDS):
        full_weights(readout(np.zeros(shape)), N_WORDS, N_LABELS)


# --- reading -------------------------------------------------------------------------------------------------------


def test_zero_weights_leave_the_label_words_logits_unchanged() -> None:
    logits, _, weights = made_up()
    found = read(logits, 0 * weights)
    assert found.dtype == np.float64
    assert found.tobytes() == logits[:, :N_LABELS].astype(np.float64).tobytes()
    assert read(logits, full_weights(None, N_WORDS, N_LABELS)).tobytes() == found.tobytes()


def test_a_bias_alone_needs_no_words() -> None:
    logits, _, _ = made_up()
    bias = np.array([[1.0, -2.0, 0.5]])
    np.testing.assert_array_equal(read(logits[:, :N_LABELS], bias), logits[:, :N_LABELS] + bias)
    np.testing.assert_array_equal(read(logits, bias), logits[:, :N_LABELS] + bias)


def test_words_add_to_labels_as_their_weights_say() -> None:
    logits = np.array([[1.0, 2.0, 10.0, 100.0]])
    weights = np.array([[0.5, 0.0], [1.0, 0.0], [0.0, -1.0]])
    np.testing.assert_allclose(read(logits, weights), [[1 + 0.5 + 10, 2 - 100]])


def test_many_candidates_are_read_like_each_one() -> None:
    logits, _, weights = made_up(12)
    together = read(logits.reshape(3, 4, -1), weights)
    np.testing.assert_allclose(together.reshape(12, -1), read(logits, weights), rtol=1e-12)


# --- several templates ---------------------------------------------------------------------------------------------


def several(n_templates: int, n: int = 12) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Logits of each template, the rows' targets, and V of each [n_templates, 1 + N_WORDS, N_LABELS]."""
    made = [made_up(n, seed) for seed in range(n_templates)]
    return [logits for logits, _, _ in made], made[0][1], np.stack([weights for _, _, weights in made])


def test_the_ensemble_of_one_template_is_its_own_logits() -> None:
    logits, _, weights = made_up()
    assert ensemble([logits], weights[None]).tobytes() == read(logits, weights).tobytes()


@pytest.mark.parametrize("n_templates", [2, 3, 5])
def test_the_ensemble_of_several_is_the_mean_of_their_log_probabilities(n_templates: int) -> None:
    logits, _, weights = several(n_templates)
    found = ensemble(logits, weights)
    assert found.shape == (12, N_LABELS)
    for row in range(12):
        logs = np.zeros(N_LABELS)
        for own, v in zip(logits, weights, strict=True):
            odds = np.exp([own[row, k] + v[0, k] + own[row, N_LABELS:] @ v[1:, k] for k in range(N_LABELS)])
            logs += np.log(odds / odds.sum()) / n_templates
        np.testing.assert_allclose(found[row], logs, rtol=1e-9)


def test_the_ensemble_ignores_shifts_of_logits_and_the_order_of_templates() -> None:
    logits, _, weights = several(3)
    shifted = [own + np.float32(shift) for own, shift in zip(logits, (0, 256, -512), strict=True)]
    plain = np.zeros_like(weights)
    np.testing.assert_allclose(ensemble(shifted, plain), ensemble(logits, plain), atol=1e-3)
    np.testing.assert_allclose(ensemble(logits[::-1], weights[::-1]), ensemble(logits, weights), rtol=1e-9)


def test_equal_templates_average_to_the_log_probabilities_of_one() -> None:
    logits, targets, weights = made_up()
    found = ensemble([logits, logits], np.stack([weights, weights]))
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(cross_entropy(found, targets), cross_entropy(read(logits, weights), targets), rtol=1e-9)


def test_many_candidates_are_averaged_like_each_one() -> None:
    logits, _, weights = several(2)
    together = ensemble([own.reshape(3, 4, -1) for own in logits], weights)
    np.testing.assert_allclose(together.reshape(12, -1), ensemble(logits, weights), rtol=1e-12)


def test_an_ensemble_of_huge_logits_stays_finite() -> None:
    found = ensemble([np.array([[1e4, -1e4]]), np.array([[-1e4, 1e4]])], np.zeros((2, 1, 2)))
    assert found.tolist() == [[-1e4, -1e4]]


def test_the_logits_of_a_template_without_weights_are_refused() -> None:
    logits, _, weights = several(2)
    with pytest.raises(ValueError):  # noqa: PT011 - of zip
        ensemble(logits, weights[:1])


def test_blocks_are_the_weights_of_the_prompts_template_then_of_the_others() -> None:
    assert blocks(None, 2, 3).tolist() == np.zeros((1, 3, 3)).tolist()
    own, few, bias = (np.full((n_rows, N_LABELS), float(n_rows)) for n_rows in (1 + N_WORDS, 3, 1))
    found = blocks(Readout(weights=Array.of(own), others=(Array.of(few), Array.of(bias))), N_WORDS, N_LABELS)
    assert found.shape == (3, 1 + N_WORDS, N_LABELS)
    assert found.sum(axis=(1, 2)).tolist() == [own.sum(), few.sum(), bias.sum()]
    assert (found[1, :3] == 3).all()
    assert (found[2, 0] == 1).all()


@pytest.mark.parametrize("shape", [(0, 3), (3,), (1, 2), (7, 3), (1, 3, 1), ()])
def test_weights_of_another_template_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    good = Array.of(np.zeros((1, N_LABELS)))
    wrong = Array.of(np.zeros(shape))
    with raises(InputError, field="readout", limit=N_WORDS):
        blocks(Readout(weights=good, others=(good, wrong)), N_WORDS, N_LABELS)


def work(n_templates: int, n_words: int = N_WORDS, **fields: object) -> FitWork:
    others = tuple(Template(pattern=f"{{text}} {i}:", label_words=("a", "b", "c")) for i in range(1, n_templates))
    return FitWork(purpose="readout", latent=Array.of(np.zeros(2)), n_words=n_words, others=others, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("n_words", [0, 2, N_WORDS])
def test_a_result_has_each_templates_gradient_and_their_mean_loss(n_words: int) -> None:
    logits, targets, weights = several(3)
    weights, centres = weights[:, : 1 + n_words], np.random.default_rng(9).standard_normal((3, n_words))
    own, *others = (Array.of(v) for v in weights)
    asked = work(3, n_words, readout=Readout(weights=own, others=tuple(others)), centre=Array.of(centres.ravel()))
    found = fit_result(asked, np.stack(logits), targets, None, N_LABELS)
    expected = [loss_and_gradient(*given) for given in zip(logits, [targets] * 3, weights, centres, strict=True)]
    assert found.loss == pytest.approx(np.mean([loss for loss, _ in expected]), rel=1e-9)
    assert (found.means.dtype, found.means.shape) == ("<f2", (3, 1 + n_words, N_LABELS))
    np.testing.assert_allclose(found.means.numpy(), [g for _, g in expected], rtol=1e-3, atol=1e-6)


def test_a_result_of_moments_has_those_of_each_template_and_the_loss_of_the_first() -> None:
    logits, targets, _ = several(3)
    bias = np.array([[1.0, 0.0, -1.0]])
    found = fit_result(work(3), np.stack(logits), targets, readout(bias), N_LABELS)
    assert found.loss == pytest.approx(loss_and_gradient(logits[0], targets, bias)[0], rel=1e-9)
    np.testing.assert_allclose(
        found.means.numpy(), [moments(own[:, N_LABELS:].astype(np.float64)) for own in logits], rtol=1e-6
    )


@pytest.mark.parametrize("n_others", [0, 1, 3])
def test_a_readout_of_another_number_of_templates_is_refused(n_others: int) -> None:
    logits, targets, weights = several(3)
    v = Array.of(weights[0])
    asked = work(3, readout=Readout(weights=v, others=(v,) * n_others))
    with raises(InputError, field="readout"):
        fit_result(asked, np.stack(logits), targets, None, N_LABELS)


@pytest.mark.parametrize("n", [1, N_WORDS, 2 * N_WORDS + 1])
def test_a_centre_of_another_size_is_refused(n: int) -> None:
    logits, targets, weights = several(2)
    v = Array.of(weights[0])
    asked = work(2, readout=Readout(weights=v, others=(v,)), centre=Array.of(np.zeros(n)))
    with raises(InputError, field="centre"):
        fit_result(asked, np.stack(logits), targets, None, N_LABELS)


# --- what a device sends -------------------------------------------------------------------------------------------


def test_moments_are_the_means_of_the_words_and_of_their_squared_norms() -> None:
    assert moments(np.array([[1.0, 2.0], [3.0, -4.0]])).tolist() == [2.0, -1.0, 15.0]
    assert moments(np.zeros((3, 0))).tolist() == [0.0]


@pytest.mark.parametrize("n_words", [0, 2, N_WORDS])
def test_the_loss_is_the_mean_cross_entropy_of_corrected_logits(n_words: int) -> None:
    logits, targets, weights = made_up()
    weights = weights[: 1 + n_words]
    loss, gradient = loss_and_gradient(logits, targets, weights)
    assert gradient.shape == weights.shape
    expected = cross_entropy(read(logits[:, : N_LABELS + n_words], weights), targets).mean()
    assert loss == pytest.approx(expected, rel=1e-12)


@given(n=st.integers(1, 20), n_words=st.integers(0, N_WORDS), seed=st.integers(0, 100))
def test_the_gradient_is_that_of_finite_differences(n: int, n_words: int, seed: int) -> None:
    logits, targets, weights = made_up(n, seed)
    weights = weights[: 1 + n_words]
    _, gradient = loss_and_gradient(logits, targets, weights)
    step = 1e-5
    for place in np.ndindex(weights.shape):
        moved = np.zeros_like(weights)
        moved[place] = step
        up, down = (loss_and_gradient(logits, targets, weights + sign * moved)[0] for sign in (1, -1))
        assert gradient[place] == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-6)


def test_weighted_by_rows_the_means_of_parts_are_those_of_the_whole() -> None:
    logits, targets, weights = made_up(20)
    whole_loss, whole_gradient = loss_and_gradient(logits, targets, weights)
    loss, gradient = 0.0, np.zeros_like(weights)
    for part in (slice(0, 3), slice(3, 4), slice(4, 20)):
        found = loss_and_gradient(logits[part], targets[part], weights)
        loss += found[0] * len(targets[part]) / 20
        gradient += found[1] * len(targets[part]) / 20
    assert loss == pytest.approx(whole_loss, rel=1e-12)
    np.testing.assert_allclose(gradient, whole_gradient, rtol=1e-12, atol=1e-12)


def test_huge_logits_stay_finite() -> None:
    logits = np.array([[1e4, -1e4], [-1e4, 1e4]], dtype=np.float32)
    loss, gradient = loss_and_gradient(logits, np.array([0, 0]), np.zeros((1, 2)))
    assert loss == 1e4
    assert gradient.tolist() == [[-0.5, 0.5]]


def test_a_row_of_weight_three_counts_as_three_rows() -> None:
    logits, targets, weights = made_up(5)
    times = np.array([1, 3, 2, 1, 1])
    repeated = np.repeat(np.arange(5), times)
    loss, gradient = loss_and_gradient(logits, targets, weights, np.ones(N_WORDS), times * 5 / 8)
    expected = loss_and_gradient(logits[repeated], targets[repeated], weights, np.ones(N_WORDS))
    assert loss == pytest.approx(expected[0], rel=1e-12)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-12, atol=1e-12)
