"""CMA-ES with ask and tell: exact, replayable, with the update of the ``cma`` package."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedbpt
from fedbpt.errors import ConfigError, InputError
from fedbpt.protocol.rounds import SearchState
from fedbpt.protocol.seeding import generator
from fedbpt.protocol.specs import Array
from fedbpt.search import cma_es
from fedbpt.search.cma_es import CmaSearch, CmaUpdate, Covariance, StepSize
from fedbpt.search.population import cholesky, sample_population
from tests.support.raises import raises

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import cma

KINDS: tuple[Covariance, ...] = ("diagonal", "full")


def ellipsoid(x: np.ndarray) -> np.ndarray:
    return ((x - 0.7) ** 2 * np.logspace(0, 2, x.shape[1])).sum(axis=1)


def run(search: CmaSearch, generations: int) -> list[np.ndarray]:
    told = []
    for _ in range(generations):
        losses = ellipsoid(search.ask())
        search.tell(losses)
        told.append(losses)
    return told


# --- the package's own update ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("popsize", [5, 12])
def test_it_equals_the_package_run_natively_on_the_same_normals(kind: Covariance, popsize: int) -> None:
    """The package itself asks and tells with our normals; only the float32 rounding of the state differs."""
    d, seed = 8, 5
    search = CmaSearch(d, 0.5, popsize, seed, kind)
    generation = 0

    def randn(rows: int, columns: int) -> np.ndarray:
        return generator(seed, "population", generation).standard_normal((rows, columns))

    csa = cma.sigma_adaptation.CMAAdaptSigmaCSA
    native = cma.CMAEvolutionStrategy(
        np.zeros(d),
        0.5,
        {
            "popsize": popsize,
            "CMA_diagonal": kind == "diagonal",
            "CMA_mirrors": 0,
            "AdaptSigma": csa,
            "randn": randn,
            "seed": np.nan,
            "verbose": -9,
        },
    )
    # The package's full sampler draws with eigenvectors, ours with the Cholesky factor: give it ours.
    for generation in range(25):  # noqa: B007
        asked = native.ask()
        if kind == "full":
            normals = randn(popsize, d)
            factor = np.linalg.cholesky(native.sm.C)
            asked = [native.mean + native.sigma * factor @ n for n in normals]
        native.tell(asked, list(ellipsoid(np.array(asked))), check_points=False if kind == "full" else None)
        search.tell(ellipsoid(search.ask()))
        np.testing.assert_allclose(search.mean, native.mean, rtol=0, atol=2e-5)
        assert search.sigma == pytest.approx(native.sigma, rel=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_two_point_adaptation_equals_the_package_run_natively(kind: Covariance) -> None:
    """Our pair has the expected length, the package's a χ: set the package's to ours."""
    d, seed, popsize = 9, 5, 10
    search = CmaSearch(d, 0.5, popsize, seed, kind, "two_point")
    generation = 0
    length = np.sqrt(d) * (1 - 1 / (4 * d) + 1 / (21 * d**2))

    def randn(rows: int, columns: int) -> np.ndarray:
        if rows == 1:
            return np.eye(1, columns) * length
        return generator(seed, "population", generation).standard_normal((popsize, columns))[popsize - rows :]

    tpa = cma.sigma_adaptation.CMAAdaptSigmaTPA
    options = {"popsize": popsize, "CMA_diagonal": kind == "diagonal", "CMA_mirrors": 0, "AdaptSigma": tpa}
    native = cma.CMAEvolutionStrategy(np.zeros(d), 0.5, {**options, "randn": randn, "seed": np.nan, "verbose": -9})
    for generation in range(20):
        asked = native.ask()
        if kind == "full":
            factor = np.linalg.cholesky(native.sm.C)
            start = 2 if generation else 0
            normals = generator(seed, "population", generation).standard_normal((popsize, d))
            asked[start:] = [native.mean + native.sigma * factor @ n for n in normals[start:]]
        native.tell(asked, list(ellipsoid(np.array(asked))), check_points=False)
        search.tell(ellipsoid(search.ask()))
        np.testing.assert_allclose(search.mean, native.mean, rtol=0, atol=1e-4)
        assert search.sigma == pytest.approx(native.sigma, rel=1e-3)


def test_noise_makes_a_large_search_wander_less_by_two_points() -> None:
    """With σ too large for noisy losses, the mean drifts from a minimum near the start, more so with path length."""
    found = {}
    for step_size in ("path", "auto"):
        search = CmaSearch(300, 1.0, 16, 1, step_size=step_size)
        for generation in range(100):
            noise = generator(2, "noise", generation).standard_normal(16)
            search.tell(((search.ask() - 0.2) ** 2).mean(axis=1) + 0.5 * noise)
        found[step_size] = ((search.mean - 0.2) ** 2).mean(), search.sigma
    assert found["auto"][0] < 0.7 * found["path"][0]
    assert found["auto"][1] < 0.7 * found["path"][1]


def test_the_dimension_decides_how_the_step_size_adapts() -> None:
    for d, meant in ((299, "path"), (300, "two_point")):
        auto, named = CmaSearch(d, popsize=4), CmaSearch(d, popsize=4, step_size=meant)
        auto.tell(np.arange(4))
        named.tell(np.arange(4))
        assert auto.digest() == named.digest()
        assert (auto.state().step is None) == (meant == "path")


@pytest.mark.parametrize("kind", KINDS)
def test_the_pair_is_mirrored_about_the_mean_and_of_the_samples_length(kind: Covariance) -> None:
    search = CmaSearch(40, 0.5, 8, 1, kind, "two_point")
    assert search.state().step is None
    run(search, 3)
    before = search.mean
    run(search, 1)
    asked, mean, shift = search.ask(), search.mean, search.mean - before
    np.testing.assert_allclose(asked[0] - mean, mean - asked[1], atol=1e-6)
    lengths = np.linalg.norm(asked - mean, axis=1)
    assert lengths[0] == pytest.approx(lengths[2:].mean(), rel=0.3)
    assert np.dot(asked[0] - mean, shift) == pytest.approx(lengths[0] * np.linalg.norm(shift), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_long_candidates_are_not_shortened(kind: Covariance) -> None:
    """The package clips candidates that it has not drawn; ours must enter the mean unchanged."""
    update = CmaUpdate(4, 1.0, 4, kind)
    candidates = 6.0 * np.eye(4)
    update.update(candidates, [0, 1, 2, 3])
    weights = cma.recombination_weights.RecombinationWeights(4).positive_weights
    np.testing.assert_allclose(update.mean, weights @ candidates[: len(weights)])


def test_foreign_candidates_are_shortened() -> None:
    update = CmaUpdate(4, 1.0, 4)
    update.update(60.0 * np.eye(4), [0, 1, 2, 3], foreign=True)
    assert np.abs(update.mean).max() < 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1, 2, 10])
def test_it_minimises(kind: Covariance, d: int) -> None:
    search = CmaSearch(d, 1.0, 12, 3, kind)
    for _ in range(150):
        search.tell(((search.ask() - 0.7) ** 2).sum(axis=1))
    np.testing.assert_allclose(search.mean, 0.7, atol=1e-3)


def test_it_makes_progress_in_500_dimensions() -> None:
    search = CmaSearch(500, 1.0, 16, 3)
    target = np.ones(500)
    for _ in range(60):
        search.tell(((search.ask() - 10 * target) ** 2).sum(axis=1))
    assert ((search.mean - 10) ** 2).sum() < 0.8 * 500 * 100


def test_only_the_order_of_losses_matters() -> None:
    one, other = CmaSearch(6, seed=2), CmaSearch(6, seed=2)
    for _ in range(10):
        losses = ellipsoid(one.ask())
        one.tell(losses)
        other.tell(np.exp(losses / 100) * 1e6)
    assert one.digest() == other.digest()


def test_ties_go_to_the_lower_index() -> None:
    one, other = CmaSearch(6, popsize=4), CmaSearch(6, popsize=4)
    one.tell([1.0, 1.0, 1.0, 1.0])
    other.tell([1.0, 2.0, 3.0, 4.0])
    assert one.digest() == other.digest()


# --- exactness ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step_size", ["path", "two_point"])
def test_replaying_the_losses_restores_the_search(kind: Covariance, step_size: StepSize) -> None:
    first = CmaSearch(9, 0.3, 6, 4, kind, step_size)
    told = run(first, 20)
    replayed = CmaSearch(9, 0.3, 6, 4, kind, step_size)
    for losses in told:
        replayed.tell(losses)
    assert replayed.digest() == first.digest()
    assert replayed.ask().tobytes() == first.ask().tobytes()
    assert replayed.evaluations == first.evaluations == 120


def test_the_digest_sees_seed_popsize_kind_and_losses() -> None:
    searches = [CmaSearch(4), CmaSearch(4, seed=1), CmaSearch(4, popsize=8), CmaSearch(4, covariance="full")]
    moved = CmaSearch(4)
    moved.tell(np.arange(16))
    assert len({s.digest() for s in [*searches, moved]}) == 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step_size", ["path", "two_point"])
def test_a_device_makes_the_same_candidates_from_the_encoded_state(kind: Covariance, step_size: StepSize) -> None:
    search = CmaSearch(7, 0.3, 6, 4, kind, step_size)
    run(search, 12)
    received = msgspec.msgpack.decode(msgspec.msgpack.encode(search.state()), type=SearchState)
    assert sample_population(received, 6, 4, 12).tobytes() == search.ask().tobytes()


@settings(max_examples=30, deadline=None)
@given(
    mean=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=6),
    sigma=st.floats(1e-6, 1e3),
    seed=st.integers(0, 2**40),
    generation=st.integers(0, 10**6),
)
def test_the_first_candidates_do_not_depend_on_the_population_size(
    mean: list[float], sigma: float, seed: int, generation: int
) -> None:
    state = SearchState(mean=Array.of(np.array(mean)), sigma=sigma)
    few, many = (sample_population(state, n, seed, generation) for n in (3, 11))
    assert few.tobytes() == many[:3].tobytes()


def test_asking_twice_gives_the_same_candidates() -> None:
    search = CmaSearch(5)
    assert search.ask().tobytes() == search.ask().tobytes()


def test_generations_and_seeds_draw_different_candidates() -> None:
    state = CmaSearch(5).state()
    draws = {sample_population(state, 4, seed, g).tobytes() for seed in (0, 1) for g in (0, 1)}
    assert len(draws) == 4


def test_the_population_has_the_states_moments() -> None:
    covariance = np.array([[2.0, 0.6, 0.0], [0.6, 1.0, -0.3], [0.0, -0.3, 0.5]])
    state = SearchState(mean=Array.of(np.array([1.0, -2.0, 3.0])), sigma=0.5, covariance=Array.of(covariance))
    x = sample_population(state, 40_000, 0, 0)
    np.testing.assert_allclose(x.mean(axis=0), [1, -2, 3], atol=0.02)
    np.testing.assert_allclose(np.cov(x.T), 0.25 * covariance, atol=0.02)
    scales = SearchState(mean=Array.of(np.zeros(3)), sigma=2.0, scales=Array.of(np.array([1.0, 2.0, 0.1])))
    np.testing.assert_allclose(sample_population(scales, 40_000, 0, 0).std(axis=0), [2, 4, 0.2], rtol=0.02)


@settings(max_examples=30, deadline=None)
@given(d=st.integers(1, 12), seed=st.integers(0, 1000))
def test_our_cholesky_factor_is_lapacks(d: int, seed: int) -> None:
    root = np.random.default_rng(seed).standard_normal((d, d))
    covariance = root @ root.T + 0.1 * np.eye(d)
    np.testing.assert_allclose(cholesky(covariance), np.linalg.cholesky(covariance), atol=1e-10)


def test_the_package_does_not_see_our_state_change_between_ask_and_state() -> None:
    search = CmaSearch(4, covariance="full")
    before = search.digest()
    search.ask()
    search.state()
    assert search.digest() == before


def test_resizing_keeps_the_distribution_and_changes_the_weights() -> None:
    update = CmaUpdate(5, 1.0, 4, all_parents=True)
    update.update(np.random.default_rng(0).standard_normal((4, 5)), [3, 1, 2, 0])
    mean, sigma = update.mean, update.sigma
    update.resize(7)
    assert np.array_equal(update.mean, mean)
    assert update.sigma == sigma
    assert update.mueff == pytest.approx(CmaUpdate(5, 1.0, 7, all_parents=True).mueff)
    update.update(np.random.default_rng(1).standard_normal((7, 5)), np.arange(7))
    update.resize(2)
    update.update(np.random.default_rng(2).standard_normal((2, 5)), [1, 0])
    assert update.generation == 3


# --- manners -----------------------------------------------------------------------------------------------------


def test_no_file_no_output_no_global_random_state(tmp_path: Path) -> None:
    code = """
import numpy as np, warnings
warnings.simplefilter("error")
from fedbpt.search.cma_es import CmaSearch
before = np.random.get_state()
for kind in ("diagonal", "full"):
    for popsize in (3, 4, 5, 16):
        for step_size in ("path", "two_point"):
            search = CmaSearch(6, 1.0, popsize, 0, kind, step_size)
            for _ in range(40):
                search.tell((search.ask() ** 2).sum(axis=1))
for a, b in zip(before, np.random.get_state()):
    assert np.array_equal(a, b)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(fedbpt.__file__).parents[2])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_the_callers_arrays_are_not_changed() -> None:
    update = CmaUpdate(3, 1.0, 4)
    candidates, losses = 50 * np.eye(4, 3), np.array([3.0, 1.0, 2.0, 0.0])
    copies = candidates.copy(), losses.copy()
    update.update(candidates, losses, foreign=True)
    assert np.array_equal(candidates, copies[0])
    assert np.array_equal(losses, copies[1])


@pytest.mark.parametrize("losses", [[1.0] * 15, [np.nan] * 16, [np.inf] + [1.0] * 15, [[1.0] * 16]])
def test_bad_losses_are_refused_and_leave_the_search_as_it_was(losses: list[float]) -> None:
    search = CmaSearch(4)
    before = search.digest()
    with pytest.raises(InputError):
        search.tell(losses)
    assert search.digest() == before


@pytest.mark.parametrize(
    "arguments",
    [
        {"d": 0},
        {"d": 3, "sigma0": 0.0},
        {"d": 3, "sigma0": np.nan},
        {"d": 3, "popsize": 2},
        {"d": 3, "covariance": "x"},
        {"d": 3, "step_size": "x"},
    ],
)
def test_bad_settings_are_refused(arguments: dict) -> None:
    with pytest.raises(InputError):
        CmaSearch(**arguments)


def bad_states() -> list[SearchState]:
    mean, one = Array.of(np.zeros(2)), Array.of(np.ones(2))
    return [
        SearchState(mean=mean, sigma=1.0, scales=Array.of(np.ones(3))),
        SearchState(mean=mean, sigma=1.0, scales=Array.of(np.array([1.0, 0.0]))),
        SearchState(mean=mean, sigma=1.0, scales=one, covariance=Array.of(np.eye(2))),
        SearchState(mean=mean, sigma=1.0, covariance=Array.of(np.eye(3))),
        SearchState(mean=mean, sigma=1.0, covariance=Array.of(np.array([[1.0, 2.0], [2.0, 1.0]]))),
        SearchState(mean=Array.of(np.zeros((2, 2))), sigma=1.0),
        SearchState(mean=mean, sigma=1.0, step=Array.of(np.ones(3))),
    ]


@pytest.mark.parametrize("state", bad_states())
def test_a_state_that_makes_no_sense_is_refused(state: SearchState) -> None:
    with pytest.raises(InputError):
        sample_population(state, 4, 0, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step_size", ["path", "two_point"])
def test_a_search_may_start_anywhere(kind: Covariance, step_size: StepSize) -> None:
    """For a start that float32 represents exactly, it is the search from 0, shifted."""
    start = np.array([4.0, -2.0, 0.5])
    here = CmaSearch(3, 1.0, 8, 5, kind, step_size)
    there = CmaSearch(3, 1.0, 8, 5, kind, step_size, start=start)
    np.testing.assert_array_equal(there.mean, start)
    for _ in range(6):
        np.testing.assert_allclose(there.ask(), here.ask() + start, atol=1e-5)
        losses = (here.ask() ** 2).sum(axis=1)
        here.tell(losses)
        there.tell(losses)
    assert here.digest() != there.digest()


def test_a_start_is_rounded_as_devices_get_it() -> None:
    search = CmaSearch(2, start=[0.1, 1 / 3])
    np.testing.assert_array_equal(search.state().mean.numpy(), search.mean)


def test_a_search_that_follows_another_counts_on_and_draws_candidates_of_its_own() -> None:
    first, second = CmaSearch(4, seed=1), CmaSearch(4, seed=1, first=7)
    assert (second.generation, second.told, second.evaluations) == (7, 0, 0)
    assert not np.isclose(first.ask(), second.ask()).any()
    assert first.digest() != second.digest()
    second.tell(np.arange(16.0))
    assert (second.generation, second.told, second.evaluations) == (8, 1, 16)


def test_the_cma_package_brings_nothing_that_is_not_used() -> None:
    script = (
        "import sys; from fedbpt.search.cma_es import CmaSearch; CmaSearch(4);"
        "print({'matplotlib', 'scipy'} & set(sys.modules)); import matplotlib.pyplot"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout == "set()\n"


def test_a_version_of_the_package_without_a_part_that_is_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cma_es, "_STATE", (*cma_es._STATE, "of_another_version"))
    with raises(ConfigError) as caught:
        cma_es.CmaUpdate(3, 1.0, 4)
    assert "of_another_version" in str(caught.value)
    assert cma_es.TESTED_CMA in str(caught.value)
