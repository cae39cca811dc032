"""The weight of one device's number of rows against the others'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fedbpt.coordinator.reports.round_reports import (
    cap_reports,
    cap_rows,
    evaluation_loss,
    label_weights,
    template_losses,
)
from fedbpt.errors import ConfigError
from fedbpt.protocol.rounds import DeviceInfo, EvaluateReport, FitResult, PooledResult, SelectResult
from fedbpt.protocol.specs import Array
from fedbpt.runs.result import RunResult
from fedbpt.runs.settings import RunSettings
from tests.support.fake_device import FakeDevice
from tests.support.raises import raises
from tests.support.toy_federation import report
from tests.support.toy_scene import Scene, StopRunError, closed, settings, stop


@pytest.mark.parametrize(
    ("counts", "cap", "capped"),
    [
        ([100, 100, 100, 100, 10**6], 2.0, [100, 100, 100, 100, 200]),
        ([10, 60, 190], 2.0, [10, 60, 120]),
        ([10, 20, 30, 40], 2.0, [10, 20, 30, 40]),
        ([4, 6, 190, 200], 1.0, [4, 6, 98, 98]),
        ([1, 1, 3], 1.5, [1, 1, 1]),
        ([5, 10**9], 2.0, [5, 10**9]),  # of two devices, the median cannot tell which is wrong
        ([7], 1.0, [7]),
        ([100, 10**6], 0.0, [100, 10**6]),
    ],
)
def test_rows_count_up_to_a_multiple_of_the_median(counts: list[int], cap: float, capped: list[int]) -> None:
    assert cap_rows(counts, cap).tolist() == capped


def test_reports_within_the_cap_are_not_changed() -> None:
    reports = [report(name, 1, PooledResult(losses=Array.of(np.arange(3.0))), n) for name, n in (("a", 8), ("b", 16))]
    assert cap_reports(reports, 2.0) == reports


def test_a_selections_sums_shrink_with_its_rows() -> None:
    sums = {"a": (8.0, 16.0), "b": (8.0, 16.0), "c": (80.0, 40.0)}
    rows = {"a": 8, "b": 8, "c": 80}
    reports = [report(name, 0, SelectResult(loss_sums=Array.of(np.array(sums[name]))), rows[name]) for name in sums]
    capped = cap_reports(reports, 2.0)
    assert [each.n_texts for each in capped] == [8, 8, 16]
    np.testing.assert_allclose(template_losses(capped, ()), [(8 + 8 + 16) / 32, (16 + 16 + 8) / 32])


def selected(*counts: tuple[int, ...]) -> list[Any]:
    sums = Array.of(np.zeros((1, len(counts[0]))))
    return [
        report(f"device-{i}", 0, SelectResult(loss_sums=sums, label_counts=each), 1) for i, each in enumerate(counts)
    ]


def test_label_counts_weigh_no_more_than_the_rows_they_are_of() -> None:
    honest = [(50, 50)] * 4
    assert label_weights(selected(*honest), 2.0) == (1.0, 1.0)
    boasted = np.array(label_weights(selected(*honest, (10**9, 1)), 2.0))
    np.testing.assert_allclose(boasted, np.array([601, 601]) / (2 * np.array([400, 201])))


def test_a_label_of_one_row_weighs_no_more_than_all_honest_rows_do() -> None:
    alone = label_weights(selected((50, 0), (50, 0), (10**9 - 1, 1)), 2.0)
    assert max(alone) <= (50 + 50 + 101) / 2


def evaluated(n: int, loss_sum: float) -> EvaluateReport:
    return EvaluateReport(n=n, correct=(0,), loss_sums=(loss_sum,), seconds=0.0)


def test_development_rows_judge_up_to_the_cap() -> None:
    reports = [evaluated(10, 5.0), evaluated(10, 5.0), evaluated(10**6, 4e6)]
    assert evaluation_loss(reports, 0.0) == (5.0 + 5.0 + 4e6) / (10**6 + 20)
    assert evaluation_loss(reports, 2.0) == (5.0 + 5.0 + 20 * 4.0) / 40
    assert evaluation_loss(reports[:2], 2.0) == 0.5


def boaster(name: str, change: Callable[[Any], Any] = lambda report: report, target: float = 1.0) -> FakeDevice:
    """A device that claims a million rows, and has another target."""

    class Boaster(FakeDevice):
        def info(self) -> DeviceInfo:
            return msgspec.structs.replace(super().info(), n_train=10**6, n_dev=10**6)

    made = Boaster(name, target=target)
    made.change = change
    return made


def claim(report: Any) -> Any:
    if isinstance(report.result, SelectResult | FitResult):
        return report
    return msgspec.structs.replace(report, n_texts=10**6)


def tuned(path: Path, *devices: FakeDevice, **changes: Any) -> RunResult:
    scene = Scene(path, *devices)
    try:
        return scene.run(**{"rounds": 30, **changes})
    finally:
        scene.store.close()


def test_a_million_claimed_rows_do_not_decide_a_run(tmp_path: Path) -> None:
    honest = [FakeDevice(name) for name in "abcd"]
    liar = boaster("liar", claim, target=-3.0)
    distances = {
        cap: float(np.abs(tuned(tmp_path / f"{cap}.db", *honest, liar, row_cap=cap).latent - 1.0).mean())
        for cap in (0.0, 2.0)
    }
    assert distances[0.0] > 3.0  # it follows the liar's target
    assert distances[2.0] < 2.0


def test_a_run_with_the_cap_resumes_to_the_same_digest(tmp_path: Path) -> None:
    whole = tuned(tmp_path / "whole.db", *map(FakeDevice, "ab"), boaster("c", claim), rounds=4)
    scene = Scene(tmp_path / "stopped.db", *map(FakeDevice, "ab"), boaster("c", claim))
    scene.when(closed(2), stop)
    with pytest.raises(StopRunError):
        scene.run()
    assert scene.run().digest == whole.digest
    with raises(ConfigError, field="run"):
        scene.run(row_cap=3.0)
    scene.store.close()


def test_equal_devices_run_alike_with_and_without_it(tmp_path: Path) -> None:
    digests = {tuned(tmp_path / f"{cap}.db", *map(FakeDevice, "abc"), rounds=4, row_cap=cap).digest for cap in (0, 1)}
    assert len(digests) == 1


def test_a_cap_below_the_median_is_refused() -> None:
    for cap in (0.0, 1.0, 1e9):
        settings(row_cap=cap)
    with pytest.raises(ConfigError):
        RunSettings(row_cap=0.5)
