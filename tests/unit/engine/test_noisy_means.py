"""Readouts from one noisy sum: what a row adds, and what is made of sums with and without noise."""

from __future__ import annotations

import numpy as np
import pytest

from fedbpt.engine.noisy_means import (
    COMPONENTS,
    FEWEST_COMPONENTS,
    WORD_CLIPS,
    Frame,
    NoisySums,
    classifier,
    clipped_sums,
    n_components,
    public_frame,
)

N_DIMS, N_LABELS, VIEWS = 60, 3, 2
RNG = np.random.default_rng(0)
MIXED = RNG.standard_normal((N_DIMS, N_DIMS)) * np.linspace(3, 0.1, N_DIMS)
CENTRES = RNG.standard_normal((N_LABELS, N_DIMS))


def states(targets: np.ndarray, rng: np.random.Generator, apart: float = 1.0) -> np.ndarray:
    return np.asarray((rng.standard_normal((len(targets), N_DIMS)) + apart * CENTRES[targets]) @ MIXED.T + 5.0)


def words(n: int, rng: np.random.Generator) -> np.ndarray:
    return np.asarray(np.log(rng.dirichlet(np.ones(N_LABELS), (n, VIEWS))))


@pytest.fixture(scope="module")
def frame() -> Frame:
    rng = np.random.default_rng(1)
    return public_frame(states(rng.integers(0, N_LABELS, 200), rng, 0.0), words(200, rng), 32)


def stacked(sums: NoisySums) -> np.ndarray:
    return np.concatenate([each.ravel() for each in sums])


def test_a_row_adds_at_most_1_whatever_it_is(frame: Frame) -> None:
    rng = np.random.default_rng(2)
    for scale in (1e-6, 1.0, 1e6):
        for target in range(N_LABELS):
            one = np.array([target])
            found = clipped_sums(scale * states(one, rng), scale * words(1, rng), one, frame, N_LABELS)
            assert np.linalg.norm(stacked(found)) <= 1 + 1e-9


def test_removing_a_row_changes_the_sums_by_what_it_adds(frame: Frame) -> None:
    rng = np.random.default_rng(3)
    targets = rng.integers(0, N_LABELS, 40)
    x, s = states(targets, rng), words(40, rng)
    whole = clipped_sums(x, s, targets, frame, N_LABELS)
    for row in range(0, 40, 7):
        kept = np.delete(np.arange(40), row)
        without = clipped_sums(x[kept], s[kept], targets[kept], frame, N_LABELS)
        assert 0.9 < np.linalg.norm(stacked(whole) - stacked(without)) <= 1 + 1e-9


def test_what_is_not_finite_of_a_row_is_left_out(frame: Frame) -> None:
    """It would show in the sum through any noise: one bit of the row, exactly."""
    rng = np.random.default_rng(8)
    targets = rng.integers(0, N_LABELS, 6)
    x, s = states(targets, rng), words(6, rng)
    found = clipped_sums(x, s, targets, frame._replace(word_clip=5e-308), N_LABELS)
    assert np.isfinite(stacked(found)).all()
    assert (found.words == 0).all()
    x[0, 0], s[1, 0, 0] = np.inf, -np.inf
    found = clipped_sums(x, s, targets, frame, N_LABELS)
    without = clipped_sums(x[2:], s[2:], targets[2:], frame, N_LABELS)
    assert np.isfinite(stacked(found)).all()
    assert np.linalg.norm(stacked(found) - stacked(without)) <= 2 + 1e-9


def test_a_frame_clips_where_devices_allow_it() -> None:
    x, s = states(np.zeros(40, dtype=np.intp), RNG, 0.0), words(40, RNG)
    clips = [public_frame(x, scale * s, 8).word_clip for scale in (1e-9, 1.0, 1e9)]
    assert (clips[0], clips[2]) == WORD_CLIPS
    assert clips[0] < clips[1] < clips[2]


def accuracy(noise: float, n: int, frame: Frame, seed: int = 4) -> float:
    rng = np.random.default_rng(seed)
    targets = np.arange(n) % N_LABELS
    exact = clipped_sums(states(targets, rng), words(n, rng), targets, frame, N_LABELS)
    noisy = NoisySums(*(each + rng.normal(0, noise, each.shape) for each in exact))
    found = classifier(noisy, frame, noise, n)
    tested = rng.integers(0, N_LABELS, 400)
    scores = words(400, rng)
    logits = states(tested, rng) @ found.weights + found.bias + found.word_scale * scores.sum(axis=1)
    assert np.isfinite(logits).all()
    return float((logits.argmax(axis=1) == tested).mean())


def test_sums_without_noise_tell_the_labels_apart_and_more_noise_tells_less(frame: Frame) -> None:
    figures = [np.mean([accuracy(noise, 300, frame, seed) for seed in range(4)]) for noise in (0.0, 2.0, 2000.0)]
    assert figures[0] > 0.8
    assert figures[0] >= figures[1] - 0.05 > figures[2]
    assert abs(figures[2] - 1 / 3) < 0.15


def test_noise_alone_says_next_to_nothing(frame: Frame) -> None:
    """Where noise drowns the rows, logits stay small: a readout must not be sure of noise."""
    rng = np.random.default_rng(5)
    p = frame.projection.shape[1]
    for _ in range(20):
        shapes = (N_LABELS,), (N_LABELS, p), (N_LABELS,)
        found = classifier(NoisySums(*(rng.normal(0, 50.0, shape) for shape in shapes)), frame, 50.0, 60)
        logits = states(rng.integers(0, N_LABELS, 50), rng) @ found.weights
        assert np.abs(logits - logits.mean(axis=1, keepdims=True)).mean() < 3


def test_label_shares_follow_counts_as_far_as_noise_lets_them(frame: Frame) -> None:
    rng = np.random.default_rng(6)
    targets = np.repeat([0, 1, 2], [150, 100, 50])
    exact = clipped_sums(states(targets, rng, 0.0), words(300, rng), targets, frame, N_LABELS)
    sure = classifier(exact, frame, 1e-9, 300)
    blind = classifier(exact, frame, 1e4, 300)
    mean_state = states(targets, rng, 0.0)
    shares = (mean_state @ sure.weights + sure.bias).mean(axis=0) + sure.word_scale * words(300, rng).sum(axis=1).mean(
        0
    )
    assert shares[0] > shares[1] > shares[2]
    assert np.abs(blind.weights).max() == pytest.approx(0, abs=1e-9)


def test_much_noise_bears_fewer_components() -> None:
    assert n_components(1.16, 4, 256, 4) == COMPONENTS
    assert n_components(4.1, 4, 256, 4) == FEWEST_COMPONENTS


def test_without_label_words_only_states_are_read() -> None:
    rng = np.random.default_rng(7)
    none = np.zeros((200, 0, 0))
    made = public_frame(states(rng.integers(0, N_LABELS, 200), rng, 0.0), none, 16)
    targets = np.arange(90) % N_LABELS
    sums = clipped_sums(states(targets, rng), none[:90], targets, made, N_LABELS)
    assert (sums.words == 0).all()
    assert classifier(sums, made, 0.1, 90).word_scale == 0
