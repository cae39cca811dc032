"""Races drop candidates early, never one of the better half."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from fedbpt.errors import InputError
from fedbpt.objective.losses import cross_entropy, hinge
from fedbpt.objective.racing import MIN_TEXTS, Race, race

K, MU = 16, 8
Floats = NDArray[np.float64]


class Judge:
    """Losses [k, n] behind a `Score` that remembers what it was asked."""

    def __init__(self, losses: Floats) -> None:
        self.losses = losses
        self.asked: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def __call__(self, who: NDArray[np.intp], texts: NDArray[np.intp]) -> Floats:
        self.asked.append((tuple(who.tolist()), tuple(texts.tolist())))
        return self.losses[np.ix_(who, texts)]

    def race(self, n_better: int = MU, guess: Floats | None = None) -> Race:
        difficulty = self.losses.mean(axis=0) if guess is None else guess
        return race(self, lambda: difficulty, *self.losses.shape, n_better=n_better)


def better_half(losses: Floats, n_better: int = MU) -> list[int]:
    return np.argsort(losses, kind="stable")[:n_better].tolist()


# Populations as tuning sees them: texts differ in difficulty; a candidate moves all texts a little, each a bit more.


def logits(rng: np.random.Generator, n: int, common: float, own: float) -> tuple[Floats, NDArray[np.intp]]:
    targets = rng.integers(0, 4, n)
    texts = rng.normal(0, 1.3, (n, 4)) + 2.0 * np.eye(4)[targets]
    return texts + common * rng.normal(size=(K, 1, 4)) + own * rng.normal(size=(K, n, 4)), targets


def alike(rng: np.random.Generator, n: int) -> Floats:
    return cross_entropy(*logits(rng, n, 0.05, 0.2))


def spread(rng: np.random.Generator, n: int) -> Floats:
    return cross_entropy(*logits(rng, n, 1.0, 0.5))


def hinges(rng: np.random.Generator, n: int) -> Floats:
    return hinge(*logits(rng, n, 0.4, 0.4))


def heavy_tails(rng: np.random.Generator, n: int) -> Floats:
    return np.abs(rng.standard_cauchy(n) * (1 + 0.1 * rng.normal(size=(K, 1))) + 0.3 * rng.standard_t(2, (K, n)))


def ties(rng: np.random.Generator, n: int) -> Floats:
    return rng.integers(0, 3, (K, n)) * rng.integers(0, 2, n) * 1.0


POPULATIONS = [alike, spread, hinges, heavy_tails, ties]


@pytest.mark.parametrize("population", POPULATIONS)
@pytest.mark.parametrize("n", [24, 64])
def test_the_better_half_is_always_that_of_scoring_everything(population: Callable[..., Floats], n: int) -> None:
    dropped = 0
    for seed in range(500):
        rng = np.random.default_rng(seed)
        losses = population(rng, n)
        guess = [losses.mean(axis=0), losses[0], rng.random(n)][seed % 3]  # good, fair, worthless
        found = Judge(losses).race(guess=guess)
        best = better_half(losses.mean(axis=1))
        assert better_half(found.losses) == best
        assert (found.n_scored[best] == n).all()
        dropped += (found.n_scored < n).any()
    assert dropped > 0


def test_a_bound_below_the_better_half_would_be_noticed() -> None:
    """The populations above tell a right bound from a wrong one: with that of the best 6, the best 8 suffer."""
    wrong = 0
    for seed in range(100):
        losses = spread(np.random.default_rng(seed), 64)
        wrong += better_half(Judge(losses).race(n_better=6).losses) != better_half(losses.mean(axis=1))
    assert wrong > 5


def test_a_clear_spread_saves_an_eighth() -> None:
    losses = spread(np.random.default_rng(0), 64)
    losses[MU:] += 2.0
    found = Judge(losses).race()
    assert found.n_scored.tolist() == MU * [64] + MU * [48]


def test_candidates_drop_after_seven_eighths_too() -> None:
    losses = np.ones((2, 64))
    losses[1] += 1 / 6  # 48 texts make 56, 56 make 65.3, and the other has 64 in all
    found = Judge(losses).race(n_better=1)
    assert found.n_scored.tolist() == [64, 56]


def test_real_populations_save_a_little_on_average() -> None:
    saved = [
        1 - Judge(population(np.random.default_rng(seed), 64)).race().n_scored.mean() / 64
        for population in (alike, spread)
        for seed in range(100)
    ]
    assert np.mean(saved) > 0.05


def test_equal_candidates_are_all_scored_to_the_end() -> None:
    losses = np.repeat(alike(np.random.default_rng(0), 64)[:1], K, axis=0)
    found = Judge(losses).race()
    assert (found.n_scored == 64).all()
    assert (found.losses == found.losses[0]).all()


def test_rounding_drops_nobody() -> None:
    texts = np.random.default_rng(1).random(64)
    losses = np.array([texts * (1 + 1e-15), texts])
    losses[:, :16] = 1e-17
    assert (Judge(losses).race(n_better=1).n_scored == 64).all()


@pytest.mark.parametrize("population", POPULATIONS)
def test_nothing_is_scored_twice_and_blocks_are_common(population: Callable[..., Floats]) -> None:
    for seed in range(20):
        judge = Judge(population(np.random.default_rng(seed), 64))
        found = judge.race()
        pairs = [(c, t) for who, texts in judge.asked for c in who for t in texts]
        assert len(pairs) == len(set(pairs)) == found.n_scored.sum()
        blocks = {texts for _, texts in judge.asked}
        assert sorted(map(len, blocks)) == [8, 8, 48]
        assert sorted(t for texts in blocks for t in texts) == list(range(64))
        assert all(who == tuple(sorted(who)) and texts == tuple(sorted(texts)) for who, texts in judge.asked)


def test_the_texts_that_are_likely_to_be_hard_come_first() -> None:
    judge = Judge(alike(np.random.default_rng(0), 64))
    judge.race(guess=np.arange(64.0))
    assert judge.asked[0] == (tuple(range(K)), tuple(range(16, 64)))


def test_the_dropped_get_their_own_sum_and_the_leaders_mean_on_the_rest() -> None:
    losses = spread(np.random.default_rng(0), 64)
    losses[MU:] += 2.0
    hard = np.argsort(-losses.mean(axis=0), kind="stable")
    rest = losses[:MU, hard[48:]].mean(axis=0).sum()
    found = Judge(losses).race()
    np.testing.assert_allclose(found.losses[:MU], losses[:MU].mean(axis=1), rtol=1e-15)
    np.testing.assert_allclose(found.losses[MU:], (losses[MU:, hard[:48]].sum(axis=1) + rest) / 64)


@pytest.mark.parametrize(("n", "n_better"), [(1, MU), (8, MU), (MIN_TEXTS - 1, MU), (64, K)])
def test_few_texts_or_no_worse_half_are_one_call_and_need_no_guess(n: int, n_better: int) -> None:
    judge = Judge(spread(np.random.default_rng(0), n))

    def difficulty() -> Floats:
        raise AssertionError("asked in vain")

    found = race(judge, difficulty, K, n, n_better=n_better)
    assert judge.asked == [(tuple(range(K)), tuple(range(n)))]
    assert np.array_equal(found.losses, judge.losses.sum(axis=1) / n)
    assert (found.n_scored == n).all()


@pytest.mark.parametrize("n_better", [-1, 0, K + 1])
def test_a_better_half_out_of_range_is_refused(n_better: int) -> None:
    judge = Judge(alike(np.random.default_rng(0), 24))
    with pytest.raises(InputError, match=rf"n_better must lie in 1\.\.{K}"):
        judge.race(n_better)
    assert not judge.asked
