"""Aggregation: deterministic, independent of order, faithful to its sources; its behaviour on skewed data."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest

from fedbpt.aggregation import Aggregator
from fedbpt.aggregation.fedavg import FedAvg
from fedbpt.aggregation.fedbpt import FedBPT
from fedbpt.aggregation.pooled import Pooled
from fedbpt.errors import InputError
from fedbpt.protocol.rounds import LocalResult, PooledResult, RoundReport
from fedbpt.protocol.specs import Array
from tests.support.toy_federation import Loss, report, run

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import cma

D = 6

MAKERS: dict[str, Callable[[], Aggregator]] = {
    "pooled": lambda: Pooled(D, 1.0, 16, seed=3),
    "pooled full": lambda: Pooled(D, 1.0, 16, seed=3, covariance="full"),
    "fedbpt": lambda: FedBPT(D, 1.0, 6, 6),
    "fedbpt diagonal": lambda: FedBPT(D, 1.0, 6, 6, covariance="diagonal"),
    "fedbpt nvflare": lambda: FedBPT(D, 1.0, 6, 6, n_devices=4, compat="nvflare"),
    "fedavg": lambda: FedAvg(D, 1.0, 16, 4),
}
every_algorithm = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def bowls() -> dict[str, Loss]:
    """Four convex devices with different minima and curvatures, far from the start."""
    rng = np.random.default_rng(0)
    devices: dict[str, Loss] = {}
    for i in range(4):
        centre, curvature = 3 + 0.4 * rng.standard_normal(D), rng.uniform(0.5, 2, D)
        devices[f"device-{i}"] = lambda z, c=centre, h=curvature: (h * (z - c) ** 2).sum(axis=1)
    return devices


def total(devices: dict[str, Loss], z: np.ndarray) -> float:
    return float(np.mean([loss(z[None])[0] for loss in devices.values()]))


@every_algorithm
def test_every_method_is_an_aggregator(make: Callable[[], Aggregator]) -> None:
    assert isinstance(make(), Aggregator)


@every_algorithm
def test_every_method_minimises_over_four_heterogeneous_devices(make: Callable[[], Aggregator]) -> None:
    devices, aggregator = bowls(), make()
    start = total(devices, aggregator.mean)
    run(aggregator, devices, 20)
    assert total(devices, aggregator.mean) < 0.1 * start


def test_pooled_search_finds_the_exact_global_minimum() -> None:
    devices, pooled = bowls(), Pooled(D, 1.0, 16, seed=3)
    run(pooled, devices, 120)
    nearby = pooled.mean + 0.01 * np.random.default_rng(1).standard_normal((50, D))
    assert total(devices, pooled.mean) <= min(total(devices, z) for z in nearby)


@every_algorithm
def test_replaying_stored_reports_gives_the_same_digest(make: Callable[[], Aggregator]) -> None:
    first, replayed = make(), make()
    digests = {first.digest()}
    for reports in run(first, bowls(), 8):
        replayed.update(reports)
        digests.add(replayed.digest())
    assert replayed.digest() == first.digest()
    assert len(digests) == 9
    assert np.array_equal(replayed.mean, first.mean)
    assert replayed.evaluations == first.evaluations
    assert replayed.work(8) == first.work(8)


@every_algorithm
def test_the_order_of_reports_does_not_matter(make: Callable[[], Aggregator]) -> None:
    one, other = make(), make()
    run(one, bowls(), 6)
    run(other, dict(reversed(list(bowls().items()))), 6, backwards=True)
    assert one.digest() == other.digest()


@pytest.mark.parametrize("name", ["pooled", "fedbpt", "fedbpt diagonal", "fedavg"])
def test_devices_may_come_and_go(name: str) -> None:
    aggregator, devices = MAKERS[name](), bowls()
    start = total(devices, aggregator.mean)
    for number in range(24):
        away = f"device-{number % 4}"
        present = {key: loss for key, loss in devices.items() if key != away or number % 3}
        if number % 5 == 0:
            present = {key: present[key] for key in list(present)[:2]}
        for reports in run(_Once(aggregator, number), present, 1):
            assert len(reports) == len(present)
    assert total(devices, aggregator.mean) < 0.1 * start


class _Once:
    """An aggregator at a given round."""

    def __init__(self, inner: Aggregator, number: int) -> None:
        self.inner, self.number = inner, number

    def work(self, _round: int) -> object:
        return self.inner.work(self.number)

    def update(self, reports: list[RoundReport]) -> None:
        self.inner.update(reports)


def test_weights_are_those_of_the_texts() -> None:
    pooled, reference = Pooled(2, popsize=4), Pooled(2, popsize=4)
    a, b = np.array([4.0, 3.0, 2.0, 1.0]), np.array([0.0, 1.0, 2.0, 3.0])
    pooled.update([loss_report("a", a, 1), loss_report("b", b, 9)])
    reference.update([loss_report("a", 0.1 * a + 0.9 * b, 5)])
    assert np.array_equal(pooled.mean, reference.mean)


def test_fedavg_averages_means_by_texts() -> None:
    fedavg = FedAvg(2, iterations=4)
    fedavg.update([mean_report("a", [1, 2], 0, 4.0, 30), mean_report("b", [5, 10], 0, 16.0, 10)])
    np.testing.assert_allclose(fedavg.mean, [2, 4])
    assert fedavg.work(1).state.sigma == pytest.approx(np.sqrt((0.75 * 4 + 0.25 * 16) / 4))


def test_pooled_work_has_the_generation_of_the_search() -> None:
    pooled = Pooled(2, popsize=4)
    assert pooled.work(0).generation == pooled.work(5).generation == 0
    pooled.update([loss_report("a", np.arange(4), 1)])
    assert pooled.work(6).generation == 1


# --- against the cma package --------------------------------------------------------------------------------


def native_server(k: int, reports: list[list[RoundReport]], divisor: float, **options: object) -> tuple[object, float]:
    """The server's equations with only the package: σ_g, tell, ratio."""
    kept = np.random.get_state()  # noqa: NPY002
    settings = {"popsize": k, "CMA_mu": k, "seed": 42, "verbose": -9, **options}
    es, local_sigma = cma.CMAEvolutionStrategy(D * [0], 1.0, settings), 1.0
    with warnings.catch_warnings():
        # Its mirrored samples (k < 6) are asked for and never told, which makes it warn.
        warnings.simplefilter("ignore", cma.evolution_strategy.InjectionWarning)
        for reports_of_round in reports:
            results = [r.result for r in reports_of_round]
            before = es.sigma = np.sqrt(sum(r.sigma_squares for r in results) / k / divisor)
            es.ask()
            es.tell([r.mean.numpy() for r in results], [r.fitness for r in results])
            local_sigma *= es.sigma / before
    np.random.set_state(kept)  # noqa: NPY002
    return es, local_sigma


def uploads(k: int, rounds: int) -> list[list[RoundReport]]:
    rng = np.random.default_rng(9)
    return [
        [mean_report(f"d{i}", 0.7 * rng.standard_normal(D), rng.random(), 8 * rng.uniform(0.5, 1), 8) for i in range(k)]
        for _ in range(rounds)
    ]


@pytest.mark.parametrize("k", [4, 8])
@pytest.mark.parametrize("rounds", [1, 4])
def test_nvflares_numbers_are_reproduced(k: int, rounds: int) -> None:
    """λ = 20 on the clients: it divides by the number of parents, 10, and takes the package's defaults."""
    reports = uploads(k, rounds)
    es, local_sigma = native_server(k, reports, divisor=10)
    ours = FedBPT(D, 1.0, popsize=20, n_devices=k, compat="nvflare")
    for reports_of_round in reports:
        ours.update(reports_of_round)
    np.testing.assert_allclose(ours.mean, es.mean, rtol=1e-6, atol=1e-7)
    assert ours.local_sigma == pytest.approx(local_sigma, rel=1e-6)
    assert ours.work(rounds).state.sigma == pytest.approx(local_sigma, rel=1e-6)
    np.testing.assert_allclose(ours.work(rounds).state.covariance.numpy(), es.sm.C, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [4, 8])
def test_the_papers_server_is_the_packages_update_with_the_papers_step_size(k: int) -> None:
    reports = uploads(k, 3)
    mueff = cma.recombination_weights.RecombinationWeights(20).mueff
    es, local_sigma = native_server(k, reports, divisor=mueff, CMA_mirrors=0)
    ours = FedBPT(D, 1.0, popsize=20)
    for reports_of_round in reports:
        ours.update(reports_of_round)
    np.testing.assert_allclose(ours.mean, es.mean, rtol=1e-6, atol=1e-7)
    assert ours.local_sigma == pytest.approx(local_sigma, rel=1e-6)


def test_a_round_of_another_size_counts_its_reports() -> None:
    """σ_g and the population follow from the number of reports, not from the configured number of devices."""
    first, second = uploads(4, 1)[0], uploads(6, 2)[1]
    ours = FedBPT(D, 1.0, popsize=20, n_devices=10)
    ours.update(first)
    fresh = FedBPT(D, 1.0, popsize=20)
    fresh.update(first)
    ours.update(second)
    fresh.update(second)
    assert ours.digest() == fresh.digest()
    assert np.isfinite(ours.mean).all()


# --- skewed data ---------------------------------------------------------------------------------------------------


def sentiment(seed: int, n: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Two noisy classes in 5 dimensions, ``share`` of them positive."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < share).astype(int)
    return rng.standard_normal((n, 5)) + 0.6 * np.outer(2 * labels - 1, [1, -1, 0.5, 0, 0]), labels


def logistic(features: np.ndarray, labels: np.ndarray) -> Loss:
    return lambda z: np.logaddexp(0, -(2 * labels - 1) * (z[:, :1] + z[:, 1:] @ features.T)).mean(axis=1)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_device_with_one_class_makes_fedbpt_collapse_but_not_pooled_search(seed: int) -> None:
    """That device can always lower its own loss by predicting its class, so it has the best fitness and leads."""
    shares = [1.0, 0.3, 0.3, 0.3]
    devices = {f"d{i}": logistic(*sentiment(100 * seed + i, 60, share)) for i, share in enumerate(shares)}
    features, labels = sentiment(999, 400, float(np.mean(shares)))
    majority = max(labels.mean(), 1 - labels.mean())

    def accuracy(z: np.ndarray) -> float:
        return float(((z[0] + features @ z[1:] > 0) == labels).mean())

    pooled, fedbpt = Pooled(6, 1.0, 16, seed), FedBPT(6, 1.0, 5, 8)
    run(pooled, devices, 40, seed)
    run(fedbpt, devices, 15, seed)
    assert accuracy(pooled.mean) > majority + 0.15
    assert accuracy(fedbpt.mean) < majority + 0.02
    loss = logistic(features, labels)
    assert loss(fedbpt.mean[None])[0] > 5 > 1 > loss(pooled.mean[None])[0]


# --- refusals ------------------------------------------------------------------------------------------------------


def loss_report(device: str, losses: np.ndarray, n_texts: int = 8) -> RoundReport:
    return report(device, 0, PooledResult(losses=Array.of(np.asarray(losses, dtype=float))), n_texts)


def mean_report(device: str, mean: object, fitness: float, squares: float, n_texts: int = 8) -> RoundReport:
    array = Array.of(np.asarray(mean, dtype=float))
    return report(device, 0, LocalResult(mean=array, fitness=fitness, sigma_squares=squares), n_texts)


GOOD_LOSSES = np.arange(16.0)
BAD: list[tuple[str, list[RoundReport]]] = [
    ("pooled", []),
    ("pooled", [loss_report("a", GOOD_LOSSES), loss_report("a", GOOD_LOSSES)]),
    ("pooled", [loss_report("a", GOOD_LOSSES[1:])]),
    ("pooled", [mean_report("a", np.zeros(D), 0, 1)]),
    ("fedbpt", [mean_report("a", np.zeros(D), 0, 1)]),
    ("fedbpt", [mean_report("a", np.zeros(D), 0, 1), mean_report("b", np.zeros(D + 1), 0, 1)]),
    ("fedbpt", [mean_report("a", np.zeros(D), 0, 1), mean_report("b", np.zeros(D), float("nan"), 1)]),
    ("fedbpt", [mean_report("a", np.zeros(D), 0, 1), loss_report("b", GOOD_LOSSES)]),
    ("fedbpt nvflare", [mean_report(name, np.zeros(D), 0, 1) for name in "abcde"]),
    ("fedavg", []),
    ("fedavg", [mean_report("a", np.zeros(D - 1), 0, 1)]),
]


@pytest.mark.parametrize(("name", "reports"), BAD)
def test_reports_that_do_not_fit_are_refused_and_change_nothing(name: str, reports: list[RoundReport]) -> None:
    aggregator = MAKERS[name]()
    before = aggregator.digest()
    with pytest.raises(InputError):
        aggregator.update(reports)
    assert aggregator.digest() == before


@pytest.mark.parametrize(
    "make",
    [
        lambda: FedBPT(D, compat="nvflare"),
        lambda: FedBPT(D, compat="other"),
        lambda: FedBPT(D, iterations=0),
        lambda: FedBPT(D, popsize=2),
        lambda: FedAvg(0),
        lambda: FedAvg(D, sigma0=-1.0),
        lambda: FedAvg(D, iterations=0),
        lambda: Pooled(0),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], Aggregator]) -> None:
    with pytest.raises(InputError):
        make()


def test_the_pooled_result_is_an_average_of_the_searchs_means_in_which_late_ones_count_more() -> None:
    pooled, means = Pooled(D, 1.0, 16, seed=3), []
    for _ in range(7):
        run(pooled, bowls(), 1)
        means.append(pooled._search.mean)
    number = np.arange(1, 8)
    weights = number * (number + 1) * (number + 2)  # polynomial decay with eta 3
    np.testing.assert_allclose(pooled.mean, np.average(means, axis=0, weights=weights), rtol=1e-9)


def test_the_averaged_mean_of_a_noisy_search_is_nearer_to_the_optimum_than_the_last() -> None:
    last, averaged = [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        pooled = Pooled(D, 1.0, 16, seed=seed)

        def noisy(z: np.ndarray, rng: np.random.Generator = rng) -> np.ndarray:
            return ((z - 1) ** 2).sum(axis=1) + 3 * rng.standard_normal(len(z))

        run(pooled, {"a": noisy}, 150, seed)
        last.append(np.linalg.norm(pooled._search.mean - 1))
        averaged.append(np.linalg.norm(pooled.mean - 1))
    assert np.mean(averaged) < np.mean(last)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "fedbpt nvflare"])
def test_a_restart_begins_at_the_given_mean(name: str) -> None:
    devices, aggregator = bowls(), MAKERS[name]()
    run(aggregator, devices, 3)
    spent, before = aggregator.evaluations, aggregator.digest()
    start = np.linspace(-2, 2, D)
    aggregator.restart(start)
    assert aggregator.digest() != before
    assert aggregator.evaluations == spent
    np.testing.assert_allclose(aggregator.mean, start, rtol=1e-6)
    work = aggregator.work(3)
    fresh = MAKERS[name]().work(0).state
    assert (work.state.sigma, work.state.step) == (1.0, None)
    assert (work.state.scales, work.state.covariance) == (fresh.scales, fresh.covariance)
    found = total(devices, start)
    run(aggregator, devices, 20)
    assert total(devices, aggregator.mean) < 0.2 * found
    assert aggregator.evaluations > spent


def test_a_restarted_pooled_search_continues_its_generations_and_averages_only_new_means() -> None:
    pooled = Pooled(D, 1.0, 16, seed=3)
    run(pooled, bowls(), 5)
    pooled.restart(np.full(D, 9.0))
    assert pooled.work(5).generation == 5
    run(pooled, bowls(), 1)
    assert pooled.work(6).generation == 6
    assert pooled.evaluations == 6 * 16
    np.testing.assert_allclose(pooled.mean, pooled.work(6).state.mean.numpy(), rtol=1e-6)  # only the first mean counts


@every_algorithm
def test_replaying_a_restart_gives_the_same_digest(make: Callable[[], Aggregator]) -> None:
    first, replayed = make(), make()
    for reports in run(first, bowls(), 3):
        replayed.update(reports)
    for aggregator in (first, replayed):
        aggregator.restart(np.ones(D))
    for reports in run(first, bowls(), 3):
        replayed.update(reports)
    assert first.digest() == replayed.digest()
    np.testing.assert_array_equal(first.mean, replayed.mean)
