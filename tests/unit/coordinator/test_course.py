"""Progress and time left of scripted runs, whose end is known."""

from __future__ import annotations

import msgspec
import pytest

from fedbpt.coordinator.costs.estimate import readout_tokens
from fedbpt.coordinator.costs.spending import Spending
from fedbpt.coordinator.monitoring.course import Course
from fedbpt.protocol.rounds import DeviceInfo
from fedbpt.protocol.specs import ObjectiveSpec
from fedbpt.runs.events import RoundPurpose
from fedbpt.runs.settings import RunSettings
from tests.support.fake_device import FakeDevice
from tests.support.toy_scene import ToyTask

RATE = 20
INFO: DeviceInfo = msgspec.structs.replace(FakeDevice("a").info(), n_dev=50, n_test=100)


class Script:
    """A run whose rounds take given times."""

    def __init__(self, **limits: object) -> None:
        self.limits = RunSettings(**({"rounds": 0} | limits))  # type: ignore[arg-type]
        self.spending = Spending()
        self.course = Course(self.spending)

    def rounds(self, purpose: RoundPurpose, n: int, seconds: float, tokens: int = 0) -> None:
        """A device processes `RATE` tokens a second, unless ``tokens`` is given."""
        tokens = tokens or round(RATE * seconds)
        for _ in range(n):
            self.spending.add_seconds(seconds, purpose != "selection")
            self.spending.tokens_for[purpose] += tokens
            self.course.closed(purpose, seconds, 16 if purpose == "search" else 0, tokens)

    @property
    def left(self) -> float | None:
        return self.course.seconds_left(self.limits, ToyTask().templates, [INFO])


def test_a_budget_in_seconds_is_counted_by_the_clock() -> None:
    run = Script(seconds=600.0, evaluations=1600)
    run.rounds("selection", 1, 90.0)  # not charged
    assert run.left == 600.0
    run.rounds("calibration", 5, 100.0)
    assert run.left == 100.0
    run.rounds("search", 57, 1.0)
    assert run.left == pytest.approx(43.0)  # neither a distant count nor how the time was spent matters
    assert run.course.share(run.limits) == pytest.approx(557 / 600)


def test_of_several_limits_the_first_counts() -> None:
    run = Script(seconds=600.0, evaluations=160, objective=ObjectiveSpec(readout_words=0))
    run.rounds("calibration", 5, 10.0)
    run.rounds("search", 4, 2.0)
    assert run.left == pytest.approx(6 * 2.0)
    run = Script(tokens=2000, objective=ObjectiveSpec(readout_words=0))
    run.rounds("selection", 1, 5.0, tokens=5000)
    run.rounds("search", 4, 2.0, tokens=100)
    assert run.left == pytest.approx(16 * 2.0)


def test_the_time_left_includes_evaluations_readout_and_final_evaluation() -> None:
    run = Script(rounds=20, evaluate_every=10)
    run.rounds("selection", 1, 30.0)
    run.course.evaluated(0, 6.0)
    run.rounds("calibration", 4, 10.0)
    assert run.left is None  # no round of the search is closed
    readout_s = readout_tokens(run.limits, ToyTask().templates, [INFO], 4 * 10 * RATE) / RATE
    assert readout_s > 1.0
    test_s = 2 * 6.0
    for done in range(1, 21):
        run.rounds("search", 1, 5.0)
        if done == 10:
            run.course.evaluated(10, 2.0 + readout_s)
        due = 6.0 + readout_s if done < 10 else 0.0
        dev_s = 6.0 if done < 10 else 2.0 + readout_s
        assert run.left == pytest.approx((20 - done) * 5.0 + due + readout_s + dev_s + test_s)
    for done in range(1, 5):
        run.rounds("readout", 1, readout_s / 4)
        assert run.left == pytest.approx((4 - done) * readout_s / 4 + 2.0 + readout_s + test_s)


def test_the_pace_is_that_of_the_last_rounds() -> None:
    run = Script(rounds=100, objective=ObjectiveSpec(readout_words=0))
    run.rounds("search", 30, 60.0)  # while the machine did something else
    run.rounds("search", 20, 1.0)
    assert run.left == pytest.approx(50.0)


def test_a_search_resumed_after_its_readout_is_counted_with_another_readout() -> None:
    run = Script(rounds=2)
    run.rounds("calibration", 1, 10.0)
    run.rounds("search", 2, 1.0)
    readout_s = run.left
    assert readout_s
    run.rounds("readout", 1, readout_s)
    assert run.left == pytest.approx(0.0)
    run.limits = RunSettings(rounds=4)
    run.rounds("search", 1, 1.0)
    assert run.left == pytest.approx(1.0 + readout_s)
