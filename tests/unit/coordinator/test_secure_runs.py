"""Secure runs: the coordinator sees sums over its devices, and finds what it finds from single reports."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fedbpt.coordinator.monitoring.round_figures import numbers_of
from fedbpt.errors import ConfigError, InputError, QuorumError
from fedbpt.protocol.names import SUM
from fedbpt.protocol.rounds import (
    KeysWork,
    MaskedResult,
    PooledWork,
    RoundPlan,
    RoundReport,
    UnmaskResult,
    UnmaskWork,
)
from fedbpt.protocol.specs import PrivacySpec
from fedbpt.runs.events import DeviceLost, RoundClosed, StageBegan
from fedbpt.runs.settings import RunSettings
from tests.support.raises import raises
from tests.support.toy_scene import StopRunError, closed, stop
from tests.support.toy_task import rows
from tests.unit.coordinator.test_layer_runs import LayerScene

NAMES = ("a", "b", "c", "d", "e")


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., LayerScene]]:
    scenes: list[LayerScene] = []

    def made(names: tuple[str, ...] = NAMES[:4]) -> LayerScene:
        shares = {name: rows(22 + 2 * i, 60 * i) for i, name in enumerate(names)}
        scenes.append(LayerScene(tmp_path / f"{len(scenes)}.sqlite", shares))
        return scenes[-1]

    yield made
    for scene in scenes:
        scene.store.close()


def plans(scene: LayerScene, kind: type) -> list[tuple[str, RoundPlan]]:
    """Plans of this kind of work, with the device that got them."""
    return [(name, plan) for name, each in scene.devices.items() for plan in each.plans if isinstance(plan.work, kind)]


def words(**changes: Any) -> dict[str, Any]:
    """A run that reads no hidden states, whose sums are the same numbers, masked or not."""
    return {"readout": "words", "baselines": True, "evaluate_every": 2, **changes}


def test_a_secure_run_finds_what_a_run_that_sees_every_report_finds(make: Callable[..., LayerScene]) -> None:
    seen, hidden = (make().run(**words(secure=secure)) for secure in (False, True))
    np.testing.assert_allclose(hidden.mean.numpy(), seen.mean.numpy(), atol=1e-6)  # losses only rank candidates
    for name in ("tuned", "zero_shot"):
        one, other = getattr(hidden, name), getattr(seen, name)
        assert (one.n, one.correct) == (other.n, other.correct)
        assert one.loss_sum == pytest.approx(other.loss_sum, rel=1e-3)
    assert hidden.rounds == seen.rounds
    assert hidden.tokens == seen.tokens


def test_the_coordinator_gets_masked_results_only(make: Callable[..., LayerScene]) -> None:
    scene = make()
    told: list[RoundReport] = []
    for device in scene.devices.values():
        device.change = lambda report: told.append(report) or report  # type: ignore[func-returns-value]
    scene.run(rounds=3, secure=True, evaluate_every=2)
    of_rows = [report for report in told if not report.run.endswith(".secure")]
    assert of_rows
    assert all(isinstance(report.result, MaskedResult) for report in of_rows)
    requests = [request for device in scene.devices.values() for request in device.requests]
    assert {request.split for request in requests} >= {"dev", "test", "held"}
    assert all(request.secure is not msgspec.UNSET for request in requests)
    for stored in scene.store.rounds("r"):
        assert [report.device for report in stored.reports] == [SUM]
        assert stored.reports[0].devices == NAMES[:4]


def test_readouts_of_hidden_states_are_fitted_to_sums(make: Callable[..., LayerScene]) -> None:
    seen, hidden = (make().run(rounds=3, secure=secure) for secure in (False, True))
    assert "probe" in hidden.layer_fits
    assert hidden.baselines["probe"].accuracy >= seen.baselines["probe"].accuracy - 0.15
    assert hidden.shipped == "probe" or hidden.tuned.accuracy >= 0.5
    assert [device.reports for device in hidden.devices] == [device.reports for device in seen.devices]


def test_every_sum_has_masks_of_its_own(make: Callable[..., LayerScene]) -> None:
    scene = make()
    scene.run(rounds=4, secure=True, evaluate_every=1)
    used = [plan.secure for _, plan in plans(scene, PooledWork) if plan.secure is not msgspec.UNSET]
    used += [request.secure for device in scene.devices.values() for request in device.requests if request.secure]
    per_device = [(use.epoch, use.index) for use in used]
    counts = {each: per_device.count(each) for each in per_device}
    assert max(counts.values()) <= len(scene.devices)
    assert len({plan.work.epoch for _, plan in plans(scene, KeysWork)}) == 1  # one epoch was enough


def test_a_device_that_drops_out_is_left_out_of_the_sum(make: Callable[..., LayerScene]) -> None:
    scene = make(NAMES)
    scene.run(rounds=1, secure=True)

    def drop(report: RoundReport) -> RoundReport:
        if report.round == 3 and isinstance(report.result, MaskedResult):
            scene.clients["c"].down = True
            raise RuntimeError("dropped out")
        return report

    scene.devices["c"].change = drop
    result = scene.run("dropping", rounds=4, secure=True, stragglers=1.0)
    assert result.rounds == 4
    rounds = [event for event in scene.of(RoundClosed) if event.purpose == "search"]
    assert any("c" in event.missing for event in rounds)
    assert result.tuned.n > 0


def test_a_device_that_comes_back_without_secrets_takes_part_again(make: Callable[..., LayerScene]) -> None:
    scene = make()
    begun: list[int] = []

    def forget(event: object) -> None:
        if isinstance(event, RoundClosed) and event.purpose == "search":
            time.sleep(0.1)  # else the search is over before the device has been probed
            begun.append(event.round)
            if len(begun) == 2:
                device = scene.devices["b"]
                device.__dict__.pop("_party", None)  # as after a restart
                scene.clients["b"].restart(graceful=True)

    scene.on_event = forget
    result = scene.run(rounds=8, secure=True, stop_if_futile=False)
    assert result.rounds == 8
    epochs = [plan.work.epoch for name, plan in plans(scene, KeysWork) if name == "b"]
    assert len(set(epochs)) >= 2
    last = [event for event in scene.of(RoundClosed) if event.purpose == "search"][-1]
    assert last.reported == NAMES[:4]


def test_a_run_that_was_stopped_resumes_from_its_sums(make: Callable[..., LayerScene]) -> None:
    whole = make().run(**words(rounds=4, secure=True))
    scene = make()
    for when in (1, 4, 6):
        scene.when(closed(when), stop)
        with pytest.raises(StopRunError):
            scene.run(**words(rounds=4, secure=True))
    scene.on_event = lambda _event: None
    resumed = scene.run(**words(rounds=4, secure=True))
    np.testing.assert_allclose(resumed.mean.numpy(), whole.mean.numpy(), atol=1e-6)


def test_devices_that_are_restarted_together_delay_a_run_and_do_not_end_it(make: Callable[..., LayerScene]) -> None:
    scene = make()

    def restart(event: object) -> None:
        if isinstance(event, RoundClosed) and event.round == 3:
            for name in ("b", "c"):
                scene.devices[name].__dict__.pop("_party", None)
                scene.clients[name].restart(graceful=True)

    scene.on_event = restart
    result = scene.run(rounds=5, secure=True)
    assert result.rounds == 5
    assert scene.of(RoundClosed)[-1].reported == NAMES[:4]


def test_one_of_three_devices_that_is_lost_for_a_while_delays_a_run(make: Callable[..., LayerScene]) -> None:
    scene = make(NAMES[:3])

    def lose(event: object) -> None:
        if isinstance(event, RoundClosed) and event.round == 3:
            scene.clients["b"].down = True
            threading.Timer(1.0, lambda: setattr(scene.clients["b"], "down", False)).start()

    scene.on_event = lose
    assert scene.run(rounds=5, secure=True, deadline_s=20.0).rounds == 5


def test_a_limit_of_rows_is_each_devices_own(make: Callable[..., LayerScene]) -> None:
    scene = make()
    result = scene.run(rounds=4, secure=True, evaluate_every=2, dev_rows=3, test_rows=2)
    assert result.dev["tuned"].n == 4 * 3
    assert result.tuned.n == 4 * 2


def test_a_run_ends_without_figures_where_too_few_devices_have_test_rows(make: Callable[..., LayerScene]) -> None:
    scene = make(NAMES)
    for name in ("c", "d", "e"):
        scene.devices[name]._rows["test"] = ()
    result = scene.run(rounds=2, secure=True)
    assert result.tuned.n == 0
    assert result.rounds == 2
    assert not scene.of(DeviceLost)


def test_a_large_device_counts_as_in_an_open_run(make: Callable[..., LayerScene]) -> None:
    found = []
    for secure in (False, True):
        scene = make()
        scene.devices["a"]._rows["train"] = tuple(rows(90))
        found.append(scene.run(**words(secure=secure, rounds=3)))
    np.testing.assert_allclose(found[1].mean.numpy(), found[0].mean.numpy(), atol=1e-6)
    losses = [each.templates[0].score.loss for each in found]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_result_with_other_fields_loses_only_its_device(make: Callable[..., LayerScene]) -> None:
    scene = make(NAMES)

    def odd(report: RoundReport) -> RoundReport:
        if not isinstance(report.result, MaskedResult) or report.round != 2:
            return report
        field = report.result.fields[0]
        fields = (msgspec.structs.replace(field, name="other"), *report.result.fields[1:])
        return msgspec.structs.replace(report, result=msgspec.structs.replace(report.result, fields=fields))

    scene.devices["d"].change = odd
    result = scene.run(rounds=3, secure=True)
    assert result.rounds == 3
    assert [event.device for event in scene.of(DeviceLost)][:1] == ["d"]


def test_a_sum_below_the_quorum_is_not_unmasked_but_tried_again(make: Callable[..., LayerScene]) -> None:
    scene = make(NAMES)
    n_odd = []

    def odd_once(report: RoundReport) -> RoundReport:
        if not isinstance(report.result, MaskedResult) or report.round != 2 or n_odd:
            return report
        n_odd.append(report.round)
        field = report.result.fields[0]
        fields = (msgspec.structs.replace(field, name="other"), *report.result.fields[1:])
        return msgspec.structs.replace(report, result=msgspec.structs.replace(report.result, fields=fields))

    scene.devices["d"].change = odd_once
    result = scene.run(rounds=3, secure=True, quorum=1.0)
    assert n_odd == [2]
    assert result.rounds == 3


def test_a_device_that_always_reveals_wrong_shares_does_no_harm_where_there_are_enough(
    make: Callable[..., LayerScene],
) -> None:
    scene = make()

    def lie(report: RoundReport) -> RoundReport:
        if not isinstance(report.result, UnmaskResult):
            return report
        return msgspec.structs.replace(report, result=UnmaskResult(shares=(bytes(33),) * len(report.result.shares)))

    scene.devices["a"].change = lie
    result = scene.run(rounds=3, secure=True)
    assert result.rounds == 3
    assert result.tuned.n > 0
    assert len({plan.work.epoch for _, plan in plans(scene, KeysWork)}) == 1


def test_a_device_answers_under_the_name_of_its_keys_only(make: Callable[..., LayerScene]) -> None:
    scene = make()
    scene.run(rounds=1, secure=True)
    device = scene.devices["a"]
    plan = next(plan for plan in device.plans if isinstance(plan.work, PooledWork))
    use = msgspec.structs.replace(plan.secure, index=60)
    with raises(InputError, field="device"):
        device.run(msgspec.structs.replace(plan, device="b", secure=use))


def test_one_device_that_is_lost_before_the_end_does_not_cost_the_figures(make: Callable[..., LayerScene]) -> None:
    scene = make(NAMES[:3])

    def lose(event: object) -> None:
        if isinstance(event, StageBegan) and event.stage == "evaluation":
            scene.clients["b"].down = True
            threading.Timer(1.0, lambda: setattr(scene.clients["b"], "down", False)).start()

    scene.on_event = lose
    assert scene.run(rounds=2, secure=True, deadline_s=20.0).tuned.n > 0


def test_a_wrong_share_costs_another_try(make: Callable[..., LayerScene]) -> None:
    scene = make(NAMES[:3])  # of which one may drop out: the first two shares are taken
    lies: list[str] = []

    def lie(report: RoundReport) -> RoundReport:
        if isinstance(report.result, UnmaskResult) and not lies:
            lies.append(report.device)
            return msgspec.structs.replace(report, result=UnmaskResult(shares=(bytes(33),) * len(report.result.shares)))
        return report

    scene.devices["a"].change = lie
    result = scene.run(rounds=2, secure=True)
    assert (result.rounds, lies) == (2, ["a"])


def test_the_store_and_the_page_name_the_devices_of_a_sum(make: Callable[..., LayerScene]) -> None:
    scene = make()
    scene.run(rounds=2, secure=True)
    assert {line.reported for line in scene.store.history("r") if line.closed} == {NAMES[:4]}
    shares = [share for closed in map(numbers_of, scene.store.rounds("r")) for share in closed.shares]
    assert {share.device for share in shares} == set(NAMES[:4])
    assert {share.loss for share in shares} == {None}


def test_two_devices_are_too_few(make: Callable[..., LayerScene]) -> None:
    scene = make(NAMES[:2])
    with raises(ConfigError, field="secure", limit=3):
        scene.run(rounds=1, secure=True)


def test_shares_that_too_few_devices_reveal_end_the_run_after_some_tries(
    make: Callable[..., LayerScene], caplog: pytest.LogCaptureFixture
) -> None:
    scene = make(NAMES[:3])

    def refuse(report: RoundReport) -> RoundReport:
        device = scene.devices[report.device]
        if isinstance(device.plans[-1].work, UnmaskWork):
            raise RuntimeError("no shares from me")
        return report

    for name in ("a", "b"):
        scene.devices[name].change = refuse
    with pytest.raises(QuorumError):
        scene.run(rounds=2, secure=True, deadline_s=2.0)
    assert "no shares from me" in caplog.text or scene.events


@pytest.mark.parametrize(
    "changes",
    [
        {"robust": "median"},
        {"method": "fedavg"},
        {"per_round": 3},
        {"even_rounds": True},
        {"privacy": PrivacySpec(clip=1.0, noise_multiplier=1.0)},
    ],
)
def test_what_needs_single_reports_is_refused(changes: dict[str, Any]) -> None:
    plain = {"calibrate": False, "objective": msgspec.structs.replace(RunSettings().objective, readout_words=0)}
    with raises(ConfigError, field=next(iter(changes))):
        RunSettings(**{**plain, **changes, "secure": True})
