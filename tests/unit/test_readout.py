"""The readout: which words, what they give, and the sums that a device sends to fit it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbpt.errors import InputError
from fedbpt.losses import cross_entropy
from fedbpt.messages import Array, Readout
from fedbpt.readout import full_weights, loss_and_gradient, moments, read, word_ids

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
def test_words_are_no_label_words_and_differ_while_the_vocabulary_lasts(n_vocab: int, n_words: int, seed: int) -> None:
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
    with pytest.raises(InputError, match="at most 5 words"):
        full_weights(readout(np.zeros(shape)), N_WORDS, N_LABELS)


# --- reading -------------------------------------------------------------------------------------------------------


def test_zero_weights_leave_the_label_words_logits_to_the_bit() -> None:
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


def test_many_candidates_are_read_as_each_of_them() -> None:
    logits, _, weights = made_up(12)
    together = read(logits.reshape(3, 4, -1), weights)
    np.testing.assert_allclose(together.reshape(12, -1), read(logits, weights), rtol=1e-12)


# --- what a device sends -------------------------------------------------------------------------------------------


def test_moments_are_the_means_of_the_words_and_of_their_squared_norms() -> None:
    assert moments(np.array([[1.0, 2.0], [3.0, -4.0]])).tolist() == [2.0, -1.0, 15.0]
    assert moments(np.zeros((3, 0))).tolist() == [0.0]


@pytest.mark.parametrize("n_words", [0, 2, N_WORDS])
def test_the_loss_is_the_mean_cross_entropy_of_what_is_read(n_words: int) -> None:
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
