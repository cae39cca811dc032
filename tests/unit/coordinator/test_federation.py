"""The round loop, over devices without a model in this process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fedbpt.aggregation.pooled import Pooled
from fedbpt.coordinator.clients import InProcessClient
from fedbpt.coordinator.federation import Federation
from fedbpt.coordinator.ledger import has_result
from fedbpt.errors import ConfigError, FedbptError, FederationError, QuorumError, StoreError
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import LocalResult, PooledResult, RoundReport
from fedbpt.protocol.specs import Array
from fedbpt.runs.events import (
    DeviceBack,
    DeviceLost,
    Evaluated,
    LateReport,
    RoundClosed,
    RunFinished,
    RunStarted,
    TemplateSelected,
)
from fedbpt.runs.result import RunResult
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore
from tests.support.fake_device import FakeDevice
from tests.support.raises import raises
from tests.support.toy_scene import D, Scene, StopRunError, ToyTask, closed, settings, stop


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path / "runs.sqlite", *(FakeDevice(name) for name in "abc"))
    yield scene
    for device in scene.devices.values():
        device.gate.set()
    scene.store.close()


def test_a_run_tunes_and_emits_its_events(scene: Scene) -> None:
    result = scene.run(rounds=30)
    assert result.tuned.accuracy > result.zero_shot.accuracy + 0.1
    assert (result.zero_shot.n, result.zero_shot.accuracy) == (60, 0.5)
    assert (result.rounds, result.evaluations, result.tokens) == (30, 180, 31 * 3 * 32)
    assert result.latent.shape == (D,)
    assert result.template.pattern == "{text} It was"
    for device in result.devices:
        assert device.bytes_up > 31 * 100
        assert device.bytes_down > 31 * 100
        assert (device.reports, device.peak_rss_bytes, device.tuned.n) == (31, 3 * 2**20, 20)
    assert 0 < result.seconds < result.total_seconds
    assert result.bytes_up == sum(device.bytes_up for device in result.devices)
    assert isinstance(scene.events[0], RunStarted)
    assert scene.events[-1] == RunFinished(result=result)
    assert scene.store.get_run("r").status == "finished"


def test_the_template_is_selected_by_mean_loss_over_all_rows(scene: Scene) -> None:
    result = scene.run(rounds=1)
    (selected,) = scene.of(TemplateSelected)
    assert (selected.index, result.template) == (1, selected.template)
    assert selected.losses[1] == len("{text} It was") / 8
    assert all(plan.template == result.template for plan in scene.devices["a"].plans[1:])


def test_one_template_needs_no_selection(scene: Scene) -> None:
    result = scene.run(task=ToyTask(templates=ToyTask().templates[:1]))
    assert [plan.round for plan in scene.devices["a"].plans] == [1, 2, 3, 4]
    assert result.template == ToyTask().templates[0]


def test_live_evaluations_use_dev_rows_and_the_final_one_test_rows(scene: Scene) -> None:
    scene.run(evaluate_every=2, dev_rows=5, test_rows=7)
    assert [(event.round, event.score.n) for event in scene.of(Evaluated)] == [(0, 15), (2, 15), (4, 15)]
    requests = scene.devices["a"].requests
    assert [request.split for request in requests] == ["dev", "dev", "dev", "test"]
    assert requests[-1].latents.shape == (2, D)
    assert not requests[-1].latents.numpy()[0].any()
    assert scene.store.history("r")[2].metrics["dev_n"] == 15


@pytest.mark.parametrize(("limit", "rounds"), [({"evaluations": 13}, 3), ({"tokens": 400}, 5), ({"seconds": 1e-9}, 1)])
def test_tuning_ends_at_the_first_limit(scene: Scene, limit: dict[str, Any], rounds: int) -> None:
    assert scene.run(**{"rounds": 0, **limit}).rounds == rounds


# --- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [0, 1, 3, 4])
def test_a_stopped_run_resumes_to_the_same_digest(scene: Scene, last: int) -> None:
    whole = scene.run("whole")
    scene.when(closed(last), stop)
    with pytest.raises(StopRunError):
        scene.run()
    assert scene.store.get_run("r").status == "stopped"
    before = len(scene.devices["a"].plans)
    result = scene.run()
    assert result.digest == whole.digest
    assert (result.evaluations, result.tokens, result.rounds) == (whole.evaluations, whole.tokens, 4)
    assert len(scene.devices["a"].plans) - before == 4 - last
    assert result.devices[0].reports == 5
    assert scene.of(RunStarted)[-1].resumed == last + 1


def test_bytes_and_seconds_add_up_over_sessions(scene: Scene) -> None:
    scene.when(closed(3), stop)
    with pytest.raises(StopRunError):
        scene.run()
    first = scene.store.traffic("r")["a"]
    spent = scene.of(RoundClosed)[-1].seconds
    result = scene.run()
    assert result.devices[0].bytes_down > first.bytes_down
    assert result.seconds > spent


def test_a_finished_run_is_returned_and_a_larger_budget_resumes_it(scene: Scene) -> None:
    result = scene.run()
    n_plans = len(scene.devices["a"].plans)
    assert scene.run() == result
    assert len(scene.devices["a"].plans) == n_plans
    more = msgspec.structs.replace(result.settings, rounds=6)
    for wanted, has in ((result.settings, True), (more, False)):  # a command that asks this waits for devices
        assert has_result(scene.store, "r", ToyTask(), wanted) is has
    assert not has_result(scene.store, "absent", ToyTask(), result.settings)
    longer = scene.run(rounds=6)
    assert longer.rounds == 6
    assert longer.digest == scene.run("other", rounds=6).digest


def test_a_run_of_other_settings_is_not_resumed(scene: Scene) -> None:
    scene.run()
    for changes in ({"seed": 4}, {"task": ToyTask(labels=("x", "z"))}, {"popsize": 8}):
        with raises(ConfigError, field="run"):
            scene.run(**changes)


def test_a_round_that_does_not_replay_is_refused(scene: Scene) -> None:
    scene.run()
    with scene.store._transaction() as db:
        db.execute("UPDATE rounds SET state_digest = 'x' WHERE round = 2")
    with raises(StoreError, field="round") as caught:
        scene.run(rounds=6)
    assert "round 2 " in str(caught.value)


# --- faults --------------------------------------------------------------------------------------------------------


def test_a_slow_device_delays_one_round_by_its_deadline_and_its_late_report_is_not_used(
    scene: Scene,
) -> None:
    scene.devices["b"].gate.clear()
    scene.when(closed(6), scene.devices["b"].gate.set)
    for device in ("a", "c"):
        scene.devices[device].slow_s = 0.02
    began = time.monotonic()
    result = scene.run(rounds=20, deadline_s=0.6, task=ToyTask(templates=ToyTask().templates[:1]))
    assert time.monotonic() - began < 4
    first, second = scene.of(RoundClosed)[:2]
    assert 0.6 <= first.seconds < 1.0
    assert second.seconds - first.seconds < 0.4
    assert (first.missing, second.missing) == (("b",), ("b",))
    lost = scene.of(DeviceLost)[0]
    assert (lost.device, lost.round) == ("b", 1)
    assert " 0.6 s" in lost.reason
    assert scene.of(LateReport) == [LateReport(device="b", round=1)]
    history = scene.store.history("r")
    assert (history[0].reported, history[0].late) == (("a", "c"), ("b",))
    assert "b" in history[0].lost
    assert scene.of(DeviceBack)[0].device == "b"
    assert 0 < result.devices[1].reports < 20
    assert result.devices[1].tuned.n == 20


def test_a_device_down_from_the_start_delays_nothing_and_joins_when_it_is_up(scene: Scene) -> None:
    scene.clients["b"].down = True
    scene.when(closed(3), lambda: setattr(scene.clients["b"], "down", False))
    for device in scene.devices.values():
        device.slow_s = 0.05
    began = time.monotonic()
    result = scene.run(rounds=25)
    assert time.monotonic() - began < 5
    assert scene.of(RunStarted)[0].live == ("a", "c")
    lost = scene.of(DeviceLost)[0]
    assert (lost.device, lost.reason) == ("b", "b: cannot be reached (in this process)")
    assert scene.of(DeviceBack)
    assert 0 < result.devices[1].reports < 25
    assert scene.store.devices("r")["b"] is not None


def test_a_device_that_goes_down_within_a_round_is_lost_and_rejoins(scene: Scene) -> None:
    scene.devices["b"].gate.clear()
    timer = threading.Timer(0.2, lambda: setattr(scene.clients["b"], "down", True))
    timer.start()
    result = scene.run()
    timer.join()
    assert result.rounds == 4
    assert scene.of(RoundClosed)[0].missing == ("b",)
    assert result.devices[1].tuned.n == 0
    assert result.tuned.n == 40


@pytest.mark.parametrize("graceful", [True, False])
def test_a_device_restarted_within_a_round_gets_its_plan_again(scene: Scene, graceful: bool) -> None:
    scene.devices["b"].gate.clear()

    def restart() -> None:
        scene.clients["b"].restart(graceful)
        time.sleep(0.2)
        scene.devices["b"].gate.set()

    timer = threading.Timer(0.2, restart)
    timer.start()
    result = scene.run(quorum=1.0)
    timer.join()
    assert scene.of(RoundClosed)[0].missing == ()
    assert [plan.round for plan in scene.devices["b"].plans][:2] == [0, 0]
    assert result.digest == scene.run("whole", quorum=1.0).digest


def test_failing_work_loses_the_device_for_the_round_with_its_reason(scene: Scene) -> None:
    scene.devices["b"].fail = RuntimeError("out of memory")
    result = scene.run()
    assert result.devices[1].reports == 0
    reason = scene.of(DeviceLost)[0].reason
    assert "RuntimeError in tests.support.fake_device" in reason
    assert scene.store.history("r")[0].lost["b"] == reason
    assert "out of memory" not in reason  # the message of a foreign error may quote a row


def swap(**fields: Any) -> Callable[[RoundReport], RoundReport]:
    return lambda report: msgspec.structs.replace(report, **fields)


LIES: dict[str, tuple[Callable[[RoundReport], RoundReport], str]] = {
    "digest": (swap(plan_digest="0"), "digest"),
    "round": (lambda report: msgspec.structs.replace(report, round=report.round + 1), "round"),
    "device": (swap(device="a"), "device"),
    "shape": (swap(result=PooledResult(losses=Array.of(np.zeros(5)))), "shape"),
    "kind": (swap(result=LocalResult(mean=Array.of(np.zeros(D)), fitness=1.0, sigma_squares=1.0)), "LocalResult"),
    "nan": (swap(result=PooledResult(losses=Array.of(np.full(6, np.nan)))), "finite"),
    "norm": (swap(result=PooledResult(losses=Array.of(np.full(6, 1e12)))), "norm"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_device_is_refused_and_named_and_stops_nobody(scene: Scene, lie: str) -> None:
    scene.devices["b"].change, said = LIES[lie]
    result = scene.run(task=ToyTask(templates=ToyTask().templates[:1]))
    assert [device.reports for device in result.devices] == [4, 0, 4]
    reasons = [event.reason for event in scene.of(DeviceLost)]
    assert reasons
    assert all(said in reason for reason in reasons)
    assert {event.device for event in scene.of(DeviceLost)} == {"b"}


def test_too_few_devices_at_the_start_are_named(scene: Scene) -> None:
    scene.clients["a"].down = scene.clients["b"].down = True
    with raises(QuorumError, limit=2) as caught:
        scene.run()
    assert "1 of 3 devices" in str(caught.value)
    assert "(a: cannot be reached (in this process); b: " in str(caught.value)


def test_a_round_without_quorum_ends_at_its_deadline_and_can_be_resumed(scene: Scene) -> None:
    scene.devices["a"].gate.clear()
    scene.devices["b"].gate.clear()
    began = time.monotonic()
    with raises(QuorumError, limit=2) as caught:
        scene.run(deadline_s=0.5)
    assert "1 of 3 devices" in str(caught.value)
    assert "0.5 s" in str(caught.value)
    assert time.monotonic() - began < 3
    scene.devices["a"].gate.set()
    scene.devices["b"].gate.set()
    assert scene.run().digest == scene.run("whole").digest


def test_a_round_that_fails_on_every_device_ends_at_once(scene: Scene) -> None:
    for device in scene.devices.values():
        device.fail = FedbptError("no rows")
    began = time.monotonic()
    with raises(QuorumError) as caught:
        scene.run(deadline_s=60)
    assert str(caught.value).endswith(": no rows")
    assert time.monotonic() - began < 5


def test_a_round_that_fails_for_several_reasons_names_them(scene: Scene) -> None:
    for name, device in scene.devices.items():
        device.fail = FedbptError(f"no rows in {name}.csv")
    with raises(QuorumError) as caught:
        scene.run(deadline_s=60)
    assert all(f"{name}: no rows in {name}.csv" in str(caught.value) for name in scene.devices)


def test_different_models_are_refused_by_name(scene: Scene) -> None:
    scene.devices["b"].fingerprint = "sha256:other"
    with raises(FederationError, field="model_fingerprint") as caught:
        scene.run()
    assert "a, c: toy (sha256:toy); b: other (sha256:other)" in str(caught.value)


def test_a_device_that_joins_late_with_another_model_is_refused(scene: Scene) -> None:
    scene.clients["b"].down = True
    scene.devices["b"].fingerprint = "sha256:other"
    scene.when(closed(0), lambda: setattr(scene.clients["b"], "down", False))
    for device in scene.devices.values():
        device.slow_s = 0.1
    assert scene.run(rounds=8).devices[1].reports == 0
    assert not scene.of(DeviceBack)


def test_a_plan_left_by_an_earlier_coordinator_is_replaced(scene: Scene) -> None:
    whole = scene.run("whole")
    scene.when(closed(2), stop)
    with pytest.raises(StopRunError):
        scene.run(deadline_s=7.0)

    async def leave() -> None:
        # As left by a coordinator that was killed: the device works on round 3 with another deadline.
        plan = msgspec.structs.replace(scene.devices["a"].plans[-1], round=3, deadline_s=9.0)
        scene.clients["a"].service.start(plan)

    asyncio.run(leave())
    assert scene.run().digest == whole.digest


def test_a_device_that_cannot_evaluate_is_left_out_of_the_result(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no test rows")

    monkeypatch.setattr(scene.devices["b"], "evaluate", fail)
    result = scene.run(evaluate_every=2)
    assert (result.tuned.n, result.devices[1].tuned.n) == (40, 0)
    assert "RuntimeError" in scene.of(DeviceLost)[0].reason


def test_if_no_device_can_evaluate_the_rounds_are_kept(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        for device in scene.devices.values():
            patch.setattr(device, "evaluate", fail)
        with raises(FederationError):
            scene.run(deadline_s=0.5)
    n_plans = len(scene.devices["a"].plans)
    assert scene.run().tuned.n == 60
    assert len(scene.devices["a"].plans) == n_plans


# --- use -----------------------------------------------------------------------------------------------------------


def test_a_run_works_inside_a_running_event_loop(scene: Scene) -> None:
    async def cell() -> RunResult:
        return scene.run(rounds=2)

    assert asyncio.run(cell()).rounds == 2


def test_duplicate_and_invalid_names_are_refused(tmp_path: Path) -> None:
    with RunStore(tmp_path / "s") as store:
        for names in (["a", "a"], ["a b"], []):
            clients = [InProcessClient(FakeDevice(name)) for name in names]
            with raises(ConfigError):
                Federation(clients, ToyTask(), settings(), Pooled(D), store, "r")
        with raises(ConfigError):
            Federation([InProcessClient(FakeDevice("a"))], ToyTask(), settings(), Pooled(D), store, "../r")


def test_a_method_that_needs_more_devices_than_there_are_is_refused(scene: Scene) -> None:
    search = Pooled(D)
    search.min_reports = 4
    with raises(ConfigError, field="per_round", limit=4):
        Federation(list(scene.clients.values()), ToyTask(), settings(), search, scene.store, "r")


def test_a_run_without_a_limit_is_refused() -> None:
    with raises(ConfigError):
        RunSettings(rounds=0)


def test_a_result_crosses_the_wire(scene: Scene) -> None:
    result = scene.run(rounds=1)
    assert codec.decode(codec.encode(result), RunResult) == result


def test_what_differs_from_a_stored_run_is_said(scene: Scene) -> None:
    scene.run(rounds=2)
    with raises(ConfigError, field="run") as caught:
        scene.run(rounds=3, seed=5)
    assert "(seed 3, now 5)" in str(caught.value)
