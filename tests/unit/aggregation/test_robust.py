"""Byzantine devices on convex losses: each attack defeats the plain mean, and no robust rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from fedbpt.aggregation import Aggregator, SearchSettings, method_named
from fedbpt.aggregation.fedavg import FedAvg
from fedbpt.aggregation.fedbpt import FedBPT
from fedbpt.aggregation.pooled import Pooled
from fedbpt.aggregation.robust import centre, krum, ranks, reports_needed
from fedbpt.errors import ConfigError, InputError
from fedbpt.protocol.rounds import LocalResult, PooledResult, PooledWork, RoundReport, Work
from fedbpt.protocol.specs import Array
from fedbpt.runs.settings import RunSettings
from tests.support.raises import raises
from tests.support.toy_federation import answer, report

D, LIARS, HONEST = 6, 2, 5
Attack = Callable[[Sequence[RoundReport], np.ndarray], list[RoundReport]]
"""From the liars' honest reports and the mean that they started from to what they send."""


class Bowl:
    """A convex device whose minimum is at a distance of about 3 from the start in each coordinate."""

    def __init__(self, name: str, number: int) -> None:
        rng = np.random.default_rng(number)
        self.name = name
        self.minimum, self.curvature = 3 + 0.3 * rng.standard_normal(D), rng.uniform(0.5, 2, D)

    def loss(self, z: np.ndarray) -> np.ndarray:
        return np.asarray((self.curvature * (z - self.minimum) ** 2).sum(axis=1))

    def answer(self, work: Work, round: int) -> RoundReport:
        """An honest report; a local search goes a third of the way to its minimum."""
        if isinstance(work, PooledWork):
            return answer(work, self.name, round, self.loss, 3)
        start = work.state.mean.numpy()
        mean = start + (self.minimum - start) / 3
        squares = work.iterations * work.state.sigma**2
        result = LocalResult(mean=Array.of(mean), fitness=float(self.loss(mean[None])[0]), sigma_squares=squares)
        return report(self.name, round, result)


DEVICES = [Bowl(f"device-{i}" if i < HONEST else f"liar-{i}", i) for i in range(HONEST + LIARS)]


def honest_loss(z: np.ndarray) -> float:
    return float(np.mean([device.loss(z[None])[0] for device in DEVICES[:HONEST]]))


def with_mean(report: RoundReport, mean: np.ndarray, **other: Any) -> RoundReport:
    result = msgspec.structs.replace(report.result, mean=Array.of(mean), **other)
    return msgspec.structs.replace(report, result=result)


def with_losses(report: RoundReport, losses: np.ndarray) -> RoundReport:
    return msgspec.structs.replace(report, result=PooledResult(losses=Array.of(losses)))


def sign_flip(reports: Sequence[RoundReport], start: np.ndarray) -> list[RoundReport]:
    """The opposite move, four times as far, with the best fitness."""
    return [with_mean(r, start - 4 * (r.result.mean.numpy() - start), fitness=-1e3) for r in reports]


def large_norm(reports: Sequence[RoundReport], start: np.ndarray) -> list[RoundReport]:
    """One far away, the other honest; with a huge step size and the best fitness."""
    far = with_mean(reports[0], start + 1e6, fitness=-1e3, sigma_squares=1e12)
    return [far, *reports[1:]]


def collude(reports: Sequence[RoundReport], start: np.ndarray) -> list[RoundReport]:
    """All the same, so that they are each other's nearest."""
    return [with_mean(r, start - 5.0, fitness=-1e3) for r in reports]


def invert(reports: Sequence[RoundReport], start: np.ndarray) -> list[RoundReport]:  # noqa: ARG001
    """Inverted losses, enlarged."""
    return [with_losses(r, -1e2 * r.result.losses.numpy()) for r in reports]


def praise_the_worst(reports: Sequence[RoundReport], start: np.ndarray) -> list[RoundReport]:  # noqa: ARG001
    """All liars report the worst four candidates as the best, at the bound."""
    order = np.argsort(np.mean([r.result.losses.numpy() for r in reports], axis=0))
    losses = np.zeros(len(order))
    losses[order[-4:]] = -1e4
    return [with_losses(r, losses) for r in reports]


def attacked(aggregator: Aggregator, attack: Attack | None, rounds: int) -> list[list[RoundReport]]:
    """A run in which ``attack`` makes the liars' reports; None: all devices are honest."""
    history = []
    for number in range(rounds):
        work = aggregator.work(number)
        reports = [device.answer(work, number) for device in DEVICES]
        if attack is not None:
            reports[HONEST:] = attack(reports[HONEST:], work.state.mean.numpy())
        aggregator.update(reports)
        history.append(reports)
    return history


def after(aggregator: Aggregator, attack: Attack | None, rounds: int) -> float:
    """The honest devices' loss at the end, as a share of that at the start."""
    start = honest_loss(aggregator.mean)
    attacked(aggregator, attack, rounds)
    return honest_loss(aggregator.mean) / start


UPLOADED = (sign_flip, large_norm, collude)
CASES = [
    *((method, robust, attack) for method in ("fedavg",) for robust in ("median", "trimmed-mean", "krum")
      for attack in UPLOADED),
    *(("fedbpt", "krum", attack) for attack in UPLOADED),
    *(("pooled", robust, attack) for robust in ("rank", "median", "trimmed-mean")
      for attack in (invert, praise_the_worst)),
]  # fmt: skip
every_case = pytest.mark.parametrize(("method", "robust", "attack"), CASES)
ROUNDS = {"fedavg": 15, "fedbpt": 15, "pooled": 40}


def make(method: str, robust: Any) -> Aggregator:
    return method_named(method).make(
        SearchSettings(d=D, sigma0=1.0, popsize=12, iterations=4, seed=3, robust=robust, byzantine=LIARS)
    )


@every_case
def test_a_robust_centre_withstands_attacks_on_the_plain_mean(method: str, robust: str, attack: Attack) -> None:
    rounds = ROUNDS[method]
    assert after(make(method, "none"), attack, rounds) > 0.5
    assert after(make(method, robust), attack, rounds) < 0.1


@every_case
def test_a_robust_centre_finds_the_minimum_of_honest_devices(method: str, robust: str, attack: Attack) -> None:  # noqa: ARG001
    assert after(make(method, robust), None, ROUNDS[method]) < 0.1


@every_case
def test_replaying_attacked_reports_gives_the_same_digest(method: str, robust: str, attack: Attack) -> None:
    live, replayed = make(method, robust), make(method, robust)
    for reports in attacked(live, attack, 4):
        replayed.update(reports[::-1])
    assert replayed.digest() == live.digest()


def test_a_device_cannot_gain_weight_by_claiming_rows() -> None:
    plain, robust = FedAvg(1), FedAvg(1, robust="median")
    reports = [with_mean(device.answer(FedAvg(D).work(0), 0), np.array([float(i)])) for i, device in enumerate(DEVICES)]
    reports[-1] = msgspec.structs.replace(reports[-1], n_texts=10**9)
    plain.update(reports)
    robust.update(reports)
    assert plain.mean[0] == pytest.approx(6, abs=1e-6)
    assert robust.mean[0] == 3


# --- against their definitions -----------------------------------------------------------------------------------

ROWS = np.random.default_rng(5).standard_normal((7, 3))
EQUAL = np.full(7, 1 / 7)


def test_the_trimmed_mean_leaves_out_the_largest_and_the_smallest_of_each_coordinate() -> None:
    expected = [np.mean(sorted(column)[2:5]) for column in ROWS.T]
    np.testing.assert_allclose(centre(ROWS, EQUAL, "trimmed-mean", 2), expected)


def test_the_median_is_that_of_each_coordinate() -> None:
    np.testing.assert_array_equal(centre(ROWS, EQUAL, "median", 2), [sorted(column)[3] for column in ROWS.T])


def test_krum_scores_by_the_nearest_reports_only() -> None:
    scores = []
    for i, row in enumerate(ROWS):
        squares = sorted(float(((row - other) ** 2).sum()) for j, other in enumerate(ROWS) if j != i)
        scores.append(sum(squares[: 7 - 2 - 2]))
    assert krum(ROWS, 2).tolist() == np.argsort(scores).tolist()
    np.testing.assert_array_equal(centre(ROWS, EQUAL, "krum", 2), ROWS[int(np.argmin(scores))])


def test_ranks_of_equal_losses_are_shared() -> None:
    np.testing.assert_array_equal(ranks(np.array([[5.0, 1.0, 5.0, 9.0], [0, 0, 0, 0]])), [[1.5, 0, 1.5, 3], [1.5] * 4])


@pytest.mark.parametrize(
    ("robust", "least"), [("none", 1), ("median", 5), ("trimmed-mean", 5), ("krum", 7), ("rank", 5)]
)
def test_too_few_reports_for_a_robust_rule_are_refused(robust: Any, least: int) -> None:
    assert reports_needed(robust, 2) == least
    centre(ROWS[:least], EQUAL[:least], robust, 2)
    if least > 1:
        with raises(InputError, limit=least):
            centre(ROWS[: least - 1], EQUAL[: least - 1], robust, 2)


def test_a_robust_rule_that_a_method_does_not_support_is_refused() -> None:
    for maker in (
        lambda: Pooled(2, robust="krum"),
        lambda: FedAvg(2, robust="rank"),
        lambda: FedBPT(2, robust="median"),
    ):
        with raises(ConfigError, field="robust"):
            maker()
    with raises(ConfigError, field="robust") as caught:
        RunSettings(robust="krum")
    assert "none, median, trimmed-mean, rank" in str(caught.value)
    for other in ({"patience": 1, "evaluate_every": 1}, {"balanced": True}):
        with raises(ConfigError):
            RunSettings(robust="median", **other)
