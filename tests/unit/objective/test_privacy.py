"""Clipped and noisy losses: calibrated noise that nobody can subtract, and its accounting."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from statistics import NormalDist
from typing import Any

import msgspec
import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant

from fedbpt.cli.report import result_as_json
from fedbpt.coordinator.federation import Federation
from fedbpt.device.device import Device
from fedbpt.errors import ConfigError, InputError, MissingExtraError
from fedbpt.objective.objective import Objective
from fedbpt.objective.privacy import ORDERS, Releases, clipped, epsilon, sampling_rate
from fedbpt.protocol.rounds import (
    FitWork,
    LocalWork,
    MomentsWork,
    PooledWork,
    Reading,
    RoundPlan,
    SearchState,
    SelectWork,
    SumsWork,
    Work,
)
from fedbpt.protocol.specs import Array, ObjectiveSpec, PrivacySpec, PromptSpec
from fedbpt.runs.events import RoundClosed
from fedbpt.runs.result import RunResult
from fedbpt.search.population import sample_population
from tests.support.raises import raises
from tests.support.toy_scene import D, Scene, StopRunError, ToyTask, closed, settings, stop
from tests.support.toy_scorer import ToyScorer

SPEC = PrivacySpec(clip=0.2, noise_multiplier=1.5)
K = 12
STATE = SearchState(mean=Array.of(np.zeros(D), "<f4"), sigma=1.0)
POOLED = PooledWork(state=STATE, generation=0, popsize=K)
ROWS = [(f"text {i} {'ugly' * (i % 2)}", i % 2) for i in range(40)]


def device(rows: list[Any] = ROWS, name: str = "pi5") -> Device:
    return Device(name, ToyScorer(), rows, rows[:4], rows[4:10], task=ToyTask())


def plan(work: Work = POOLED, **changes: Any) -> RoundPlan:
    fields: dict[str, Any] = {
        "run": "r",
        "round": 1,
        "device": "pi5",
        "seed": 7,
        "model_fingerprint": ToyScorer().fingerprint,
        "task": ToyTask().identity,
        "labels": ("x", "y"),
        "template": ToyTask().templates[0],
        "prompt": PromptSpec(d=D),
        "objective": ObjectiveSpec(batch_size=8, readout_words=0),
        "work": work,
        "privacy": SPEC,
    }
    return RoundPlan(**{**fields, **changes})


def losses_of(report: Any) -> np.ndarray:
    return np.asarray(report.result.losses.numpy())


# --- the mechanism -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 10])
def test_the_noise_has_the_specified_standard_deviation(size: int) -> None:
    """Without losses a release is only noise, with standard deviation z·C over the expected rows."""
    empty = lambda sample: np.zeros((K, len(sample)))  # noqa: E731
    draws = np.array([Releases(SPEC, b"key", str(i)).mean(0, K, 40, size, empty) for i in range(2000)])
    wanted = 1.5 * 0.2 / (size or 40)
    assert draws.std() == pytest.approx(wanted, rel=4 / math.sqrt(2 * draws.size))
    assert abs(draws.mean()) < 4 * wanted / math.sqrt(draws.size)
    between = np.corrcoef(draws.T) - np.eye(K)
    assert np.abs(between).max() < 5 / math.sqrt(len(draws))


def test_rows_are_sampled_at_the_accounted_rate() -> None:
    seen: list[int] = []
    look = lambda sample: seen.extend(sample) or np.zeros((K, len(sample)))  # noqa: E731
    for i in range(1000):
        Releases(SPEC, b"key", str(i)).mean(0, K, 40, 10, look)
    rate = sampling_rate(40, 10)
    counts = np.bincount(seen, minlength=40)
    assert rate == 0.25
    assert np.abs(counts - 1000 * rate).max() < 5 * math.sqrt(1000 * rate * (1 - rate))


def test_a_row_changes_the_sum_by_at_most_the_clip() -> None:
    rng = np.random.default_rng(0)
    losses = rng.exponential(5.0, (K, 300)) * rng.uniform(1e-3, 1, 300) + 100
    found = clipped(losses, 0.2)
    norms = np.linalg.norm(found, axis=0)
    assert norms.max() <= 0.2 * (1 + 1e-12)
    np.testing.assert_allclose(found.sum(axis=0), 0, atol=1e-12)
    small = clipped(0.01 * losses / np.linalg.norm(losses, axis=0), 0.2)
    np.testing.assert_allclose(small, 0.01 * (losses - losses.mean(axis=0)) / np.linalg.norm(losses, axis=0))


def test_a_row_whose_losses_are_not_finite_adds_nothing() -> None:
    """It would show in the sum through any noise."""
    losses = np.array([[0.1, np.inf, np.nan], [0.3, 0.1, 0.2]])
    assert clipped(losses, 5.0) == pytest.approx(np.array([[-0.1, 0, 0], [0.1, 0, 0]]))


@pytest.mark.parametrize("size", [0, 8])
def test_emptying_a_row_changes_a_release_by_at_most_the_sensitivity(size: int) -> None:
    """With the same sample and noise, releases of neighbouring data differ by that row: at most C/(q·n)."""
    losses = np.random.default_rng(1).exponential(3.0, (K, 40))
    without = losses.copy()
    without[:, 5] = 0
    moved = []
    for i in range(50):
        one, other = (
            Releases(SPEC, b"key", str(i)).mean(0, K, 40, size, lambda s, v=v: v[:, s]) for v in (losses, without)
        )
        moved.append(float(np.linalg.norm(one - other)))
    assert max(moved) == pytest.approx(0.2 / (size or 40))
    assert (min(moved) == 0) == bool(size)


# --- a device ----------------------------------------------------------------------------------------------------


def test_a_repeated_query_has_the_same_result_and_another_has_other_noise() -> None:
    asked = device()
    first = asked.run(plan())
    again = asked.run(plan(deadline_s=5.0))  # a run that is resumed with another deadline
    assert again.result == first.result
    for other in (plan(round=2), plan(run="s"), plan(privacy=msgspec.structs.replace(SPEC, clip=0.3))):
        assert (losses_of(asked.run(other)) != losses_of(first)).all()


def test_nobody_who_knows_the_plan_can_subtract_the_noise() -> None:
    """Two devices with the same rows and the same plan, seeds included, differ only by their keys."""
    assert (losses_of(device().run(plan())) != losses_of(device().run(plan()))).all()


@pytest.mark.slow
def test_a_release_is_of_the_devices_own_clipped_losses() -> None:
    whole = plan(objective=ObjectiveSpec(batch_size=0, readout_words=0))
    objective = Objective(ToyScorer(), whole.template, whole.labels, ROWS, whole.objective, whole.prompt)
    latents = sample_population(STATE, K, 7, 0)
    exact = clipped(objective.row_losses(objective.embeds(latents), np.arange(40)), 0.2).mean(axis=1)
    found = np.array([losses_of(device().run(whole)) for _ in range(25)])
    error = found.mean(axis=0) - exact
    assert np.abs(error).max() < 5 * 1.5 * 0.2 / 40 / 5
    np.testing.assert_allclose(found.std(), math.hypot(0.3 / 40, exact.std()), rtol=0.2)


@pytest.mark.parametrize(
    "work", [POOLED, SelectWork(templates=ToyTask().templates), LocalWork(state=STATE, iterations=2, popsize=K)]
)
def test_the_counters_of_a_release_do_not_depend_on_the_sample(work: Work) -> None:
    reports = [device().run(plan(work)) for _ in range(6)]
    assert len({(r.tokens, r.evaluations, r.seconds, r.n_texts) for r in reports}) == 1
    assert reports[0].n_texts == 40


def test_a_private_local_search_sends_only_results_of_noisy_losses() -> None:
    result = device().run(plan(LocalWork(state=STATE, iterations=2, popsize=K))).result
    assert result.fitness == 0  # on all rows, it would need noise of its own


READING = Reading(latent=Array.of(np.zeros(D)), templates=(), layers=(1,), n_word_views=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"work": FitWork(purpose="readout", latent=Array.of(np.zeros(D)), n_words=0)},
        {"work": SumsWork(purpose="probe", reading=READING, max_rank=4)},
        {"work": MomentsWork(purpose="probe", reading=READING)},
        {"work": SelectWork(templates=ToyTask().templates, by_label=True)},
        {"objective": ObjectiveSpec(perturb=0.5, readout_words=0)},
    ],
)
def test_a_device_refuses_a_private_plan_for_results_without_noise(changes: dict[str, Any]) -> None:
    with raises(InputError, field="privacy"):
        device().run(plan(**changes))


# --- the accountant ----------------------------------------------------------------------------------------------


def gaussian_delta(eps: float, z: float) -> float:
    """δ of one Gaussian release exactly (Balle & Wang 2018, arXiv 1805.06530, theorem 8)."""
    cdf = NormalDist().cdf
    return cdf(1 / (2 * z) - eps * z) - math.exp(eps) * cdf(-1 / (2 * z) - eps * z)


@pytest.mark.parametrize("z", [0.7, 1.0, 4.0])
def test_epsilon_of_one_release_bounds_the_closed_form_tightly(z: float) -> None:
    spec = PrivacySpec(clip=1.0, noise_multiplier=z, delta=1e-5)
    found = epsilon(spec, [(1.0, 1)])
    assert gaussian_delta(found, z) <= 1e-5
    assert gaussian_delta(found * 0.85, z) > 1e-5
    renyi = min(
        a / (2 * z * z) + math.log((a - 1) / a) - (math.log(1e-5) + math.log(a)) / (a - 1)
        for a in np.linspace(1.01, 80, 20000)
    )  # Canonne et al. 2020, arXiv 2004.00010, proposition 12
    assert renyi * (1 - 1e-6) <= found <= renyi * 1.03


def test_epsilon_equals_the_librarys() -> None:
    account = RdpAccountant(ORDERS, NeighboringRelation.REPLACE_SPECIAL)
    noise = GaussianDpEvent(1.5)
    account.compose(PoissonSampledDpEvent(0.2, noise), 30).compose(noise, 1)
    assert epsilon(SPEC, [(0.2, 30), (1.0, 1)]) == pytest.approx(account.get_epsilon(1e-5))
    default = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_SPECIAL)
    default.compose(PoissonSampledDpEvent(0.2, noise), 30).compose(noise, 1)
    assert epsilon(SPEC, [(0.2, 30), (1.0, 1)]) == pytest.approx(default.get_epsilon(1e-5), rel=0.03)
    assert epsilon(SPEC, [(0.2, 31), (1.0, 1)]) > epsilon(SPEC, [(0.2, 30), (1.0, 1)]) > epsilon(SPEC, [(0.2, 30)])


def test_without_the_library_a_private_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(MissingExtraError, match=r"fedbpt\[privacy\]"):
        scene(tmp_path).federation(privacy=SPEC)


# --- runs --------------------------------------------------------------------------------------------------------


def scene(path: Path) -> Scene:
    return Scene(path / "runs.db", device(name="a"), device(ROWS[:20], "b"))


def tune(scene: Scene, **changes: Any) -> RunResult:
    chosen = settings(privacy=SPEC, objective=ObjectiveSpec(readout_words=0, batch_size=5), **changes)
    search = chosen.aggregator()
    hear = lambda event: (scene.events.append(event), scene.on_event(event))  # noqa: E731
    return Federation(list(scene.clients.values()), ToyTask(), chosen, search, scene.store, "r", hear).run()


@pytest.mark.parametrize(("method", "releases"), [("pooled", 1), ("fedavg", 2)])
def test_epsilon_is_reported_per_round_for_the_device_with_the_fewest_rows(
    tmp_path: Path, method: str, releases: int
) -> None:
    made = scene(tmp_path)
    result = tune(made, method=method, rounds=3, iterations=2)
    told = [event.epsilon for event in made.of(RoundClosed)]
    # 32 rows select the template: all 20 of the smaller device; then 5 of 20 per release
    assert told == [epsilon(SPEC, [(1.0, 1), (0.25, releases * number)]) for number in range(4)]
    assert result.epsilon == told[-1]
    assert result_as_json(result, None)["epsilon"] == told[-1]
    kept = [line.metrics["epsilon"] for line in made.store.history("r")]
    assert kept[: len(told)] == told


def test_a_private_run_that_is_stopped_resumes_to_the_same_digest_and_epsilon(tmp_path: Path) -> None:
    made = scene(tmp_path)
    made.when(closed(2), stop)
    with pytest.raises(StopRunError):
        tune(made)
    whole = Scene(tmp_path / "whole.db")
    whole.devices, whole.clients = made.devices, made.clients  # the devices keep their keys
    for client in made.clients.values():
        client.restart(graceful=True)
    resumed = tune(made)
    for client in made.clients.values():
        client.restart(graceful=True)
    uninterrupted = tune(whole)
    assert resumed.digest == uninterrupted.digest
    assert resumed.epsilon == uninterrupted.epsilon


@pytest.mark.parametrize(
    "changes",
    [
        {"calibrate": True},
        {"balanced": True},
        {"method": "fedbpt"},
        {"objective": ObjectiveSpec(readout_words=0, perturb=0.5)},
        {"objective": ObjectiveSpec(readout_words=4, perturb=0.5)},
        {"objective": ObjectiveSpec(readout_words=4), "balanced": True},
        {"objective": ObjectiveSpec(readout_words=4), "readout": "words"},
        {"objective": ObjectiveSpec(readout_words=4), "readout": "layers"},
        {"objective": ObjectiveSpec(readout_words=4), "readout": "logistic"},
        {"objective": ObjectiveSpec(readout_words=4), "robust": "median"},
        {"readout": "means"},
    ],
    ids=str,
)
def test_settings_without_noise_are_refused_with_privacy(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        settings(privacy=SPEC, **changes)
