"""Whole runs with a Byzantine device: the template, the fits, the search, and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fedbpt.aggregation.readout import ReadoutFit
from fedbpt.coordinator.federation import Federation
from fedbpt.errors import ConfigError
from fedbpt.objective.readout import fit_result, full_weights
from fedbpt.protocol.rounds import FitResult, PooledResult, RoundReport, SelectResult
from fedbpt.protocol.specs import Array
from fedbpt.runs.events import DeviceLost
from fedbpt.runs.result import RunResult
from fedbpt.runs.settings import RunSettings
from tests.support.fake_device import FakeDevice
from tests.support.raises import raises
from tests.support.toy_federation import report
from tests.support.toy_scene import D, Scene, StopRunError, ToyTask, closed, settings, stop

HONEST = ("a", "b", "c", "d")


def lie(report: RoundReport) -> RoundReport:
    """Inverted losses of templates and of candidates."""
    if isinstance(report.result, SelectResult):
        sums = 8 * 9000 - 1e3 * report.result.loss_sums.numpy()
        return msgspec.structs.replace(report, result=SelectResult(loss_sums=Array.of(sums)))
    assert isinstance(report.result, PooledResult)
    # Within the bound on losses: a report that is refused does not affect the plain mean either.
    losses = PooledResult(losses=Array.of(np.clip(9000 - 6 * report.result.losses.numpy(), 0, 9000)))
    return msgspec.structs.replace(report, result=losses)


def scene(path: Path) -> Scene:
    devices = [FakeDevice(name) for name in (*HONEST, "liar")]
    devices[-1].change = lie
    return Scene(path, *devices)


def tune(scene: Scene, **changes: Any) -> RunResult:
    chosen = settings(**{"rounds": 30, **changes})
    clients = list(scene.clients.values())
    hear = lambda event: (scene.events.append(event), scene.on_event(event))  # noqa: E731
    return Federation(clients, ToyTask(), chosen, chosen.aggregator(), scene.store, "r", hear).run()


def distance(result: RunResult) -> float:
    return float(((result.latent - 1.0) ** 2).sum())


def test_one_byzantine_device_of_five_decides_a_trusting_run_but_no_checked_or_robust_one(tmp_path: Path) -> None:
    attacked = scene(tmp_path / "plain.db")
    plain = tune(attacked, rounds=8, check_devices=False)
    assert not attacked.of(DeviceLost)
    checked = tune(scene(tmp_path / "checked.db"))
    assert checked.template == ToyTask().templates[1]
    assert distance(checked) < 0.2 * D
    robust = tune(scene(tmp_path / "robust.db"), robust="rank")
    assert plain.template != robust.template == ToyTask().templates[1]
    assert distance(plain) > D
    assert distance(robust) < 0.2 * D


def test_an_attacked_run_that_is_stopped_resumes_to_the_same_digest(tmp_path: Path) -> None:
    whole = tune(scene(tmp_path / "whole.db"), robust="median")
    stopped = scene(tmp_path / "stopped.db")
    stopped.when(closed(7), stop)
    with pytest.raises(StopRunError):
        tune(stopped, robust="median")
    assert tune(stopped, robust="median").digest == whole.digest


def test_a_run_with_too_few_devices_for_its_robust_rule_is_refused(tmp_path: Path) -> None:
    with raises(ConfigError, field="per_round", limit=7):
        tune(scene(tmp_path / "runs.db"), robust="trimmed-mean", byzantine=3)


def test_a_run_begun_without_a_robust_rule_is_not_resumed_with_one(tmp_path: Path) -> None:
    begun = scene(tmp_path / "runs.db")
    tune(begun)
    with raises(ConfigError, field="run"):
        tune(begun, robust="rank")


@pytest.mark.parametrize(("field", "value"), [("n_texts", 17), ("evaluations", 10**6)])
def test_a_device_that_makes_up_rows_or_evaluations_is_lost(tmp_path: Path, field: str, value: int) -> None:
    made = scene(tmp_path / "runs.db")
    made.devices["liar"].change = lambda report: msgspec.structs.replace(report, **{field: value})
    tune(made)
    lost = [event for event in made.of(DeviceLost) if event.device == "liar"]
    assert lost
    assert f"{field} is {value}" in lost[0].reason


@pytest.mark.parametrize("robust", ["median", "trimmed-mean", "rank"])
@pytest.mark.parametrize("n_words", [0, 4])
def test_a_fit_withstands_byzantine_gradients(robust: Any, n_words: int) -> None:
    """Compares the cross-entropy of all honest rows after the fit with that before it."""
    before, plain, robustly = (fitted_loss(n_words, choice) for choice in (None, "none", robust))
    assert plain > 0.9 * before  # it learned nothing, or worse
    assert robustly < 0.5 * before


def fitted_loss(n_words: int, robust: Any) -> float:
    rng = np.random.default_rng(2)
    rows, n_labels = 40, 3
    shards = []
    for _ in range(5):
        logits = rng.standard_normal((1, rows, n_labels + n_words)).astype(np.float32)
        best = logits[0, :, :n_labels] + np.array([1.5, 0, -1.5]) + 0.5 * rng.standard_normal((rows, n_labels))
        shards.append((logits, best.argmax(axis=1)))
    fit = ReadoutFit("readout", np.zeros(2), n_words, n_labels, robust=robust or "none", byzantine=1)
    while robust and not fit.done:
        work = fit.work()
        results = [fit_result(work, logits, targets, None, n_labels) for logits, targets in shards]
        bent = -30 * results[-1].means.numpy()
        bent = bent if work.readout else np.abs(bent)  # squares below 0 would be refused
        results[-1] = FitResult(purpose="readout", loss=-9.0, means=Array.of(bent))
        fit.update([report(f"device-{i}", 1, result, rows) for i, result in enumerate(results)])
    weights = full_weights(fit.readout, n_words, n_labels)
    total = 0.0
    for logits, targets in shards[:-1]:
        found = logits[0, :, :n_labels] + weights[0] + logits[0, :, n_labels:] @ weights[1:]
        found = found - found.max(axis=1, keepdims=True)
        total += float((np.log(np.exp(found).sum(axis=1)) - found[np.arange(rows), targets]).sum())
    return total / (4 * rows)


def test_settings_make_the_aggregator_that_they_name() -> None:
    chosen = settings(robust="median", byzantine=2)
    assert chosen.aggregator().min_reports == 5
    assert RunSettings(method="fedbpt", robust="krum", byzantine=2).aggregator().min_reports == 7
