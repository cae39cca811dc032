"""Slow devices: usual times, over-selection, and mini-batches by speed."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fedbpt.coordinator.devices.fleet import Fleet
from fedbpt.coordinator.devices.members import Listener
from fedbpt.coordinator.devices.stragglers import ENOUGH, SLACK_S, Pace, TextPace
from fedbpt.errors import ConfigError, QuorumError
from fedbpt.protocol.rounds import RoundPlan, RoundReport
from fedbpt.runs.events import DeviceLost, LateReport, RoundClosed
from tests.support.fake_device import FakeDevice
from tests.support.raises import raises
from tests.support.toy_scene import FlakyClient, Scene, StopRunError, ToyTask, closed

pytestmark = pytest.mark.slow

HOUR = 3600.0  # a deadline that no test waits for


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path / "runs.sqlite", *(FakeDevice(name) for name in "abcde"))


def searched(scene: Scene) -> list[RoundClosed]:
    return [event for event in scene.of(RoundClosed) if event.purpose == "search"]


def stop() -> None:
    raise StopRunError


# --- usual times ---------------------------------------------------------------------------------------------------


def test_a_device_has_no_limit_until_its_usual_time_is_known() -> None:
    pace = Pace(stragglers=3.0)
    for seconds in (10.0, 100.0, 12.0)[: ENOUGH - 1]:
        pace.took("a", "search", seconds)
    assert pace.limit("a", "search") == float("inf")
    pace.took("a", "search", 12.0)
    assert pace.limit("a", "search") == 3 * 12.0 + SLACK_S
    assert pace.limit("a", "readout") == pace.limit("b", "search") == float("inf")


def test_zero_waits_for_all_devices() -> None:
    pace = Pace(stragglers=0.0)
    for _ in range(ENOUGH):
        pace.took("a", "search", 1.0)
    assert pace.limit("a", "search") == float("inf")


@pytest.mark.timeout(60)
def test_a_round_does_not_wait_for_a_sleeping_device_until_the_deadline(scene: Scene) -> None:
    asleep = scene.devices["c"].gate
    scene.when(closed(5), asleep.clear)
    scene.run(rounds=8, deadline_s=HOUR)
    missing = [event.missing for event in searched(scene)]
    assert missing == [()] * 5 + [("c",)] * 3
    lost = scene.of(DeviceLost)[0]
    assert (lost.device, lost.round) == ("c", 6)
    assert lost.reason.startswith("round ")


@pytest.mark.timeout(60)
def test_a_device_that_wakes_is_late_and_takes_part_again(scene: Scene) -> None:
    asleep = scene.devices["c"].gate
    scene.when(closed(5), asleep.clear)
    rest = scene.on_event

    def react(event: Any) -> None:
        rest(event)
        if closed(7)(event):
            asleep.set()
        if isinstance(event, LateReport):
            for device in scene.devices.values():
                device.slow_s = 0.0
        elif closed(6)(event):
            for name in "abde":
                scene.devices[name].slow_s = 0.05  # rounds long enough for it to come back

    scene.on_event = react
    scene.run(rounds=40, deadline_s=HOUR)
    assert [(event.device, event.round) for event in scene.of(LateReport)] == [("c", 6)]
    assert searched(scene)[-1].missing == ()


# --- over-selection ------------------------------------------------------------------------------------------------


def test_over_selection_invites_more_devices_than_the_round_needs(scene: Scene) -> None:
    asked: Counter[int] = Counter()
    for client in scene.clients.values():

        async def work(plan: RoundPlan, *rest: Any, work: Any = client.work) -> RoundReport:
            asked[plan.round] += 1
            return await work(plan, *rest)

        client.work = work  # type: ignore[method-assign]
    scene.run(rounds=6, per_round=2, over_selection=0.5)
    assert {len(event.reported) for event in searched(scene)} <= {2, 3}  # the third may be as fast
    assert scene.of(DeviceLost) == []
    assert asked.pop(0) == 5  # all devices select the template
    assert set(asked.values()) == {3}


@pytest.mark.timeout(60)
def test_a_sleeping_device_in_an_over_selected_round_delays_nothing(scene: Scene) -> None:
    scene.when(closed(0), scene.devices["b"].gate.clear)
    scene.run(rounds=12, per_round=3, over_selection=0.4, deadline_s=HOUR)
    assert all(len(event.reported) >= 3 and "b" not in event.reported for event in searched(scene))
    assert any(plan.round > 0 for plan in scene.devices["b"].plans)


def test_each_round_draws_other_devices_and_the_same_run_the_same_ones(scene: Scene, tmp_path: Path) -> None:
    scene.run(rounds=12, per_round=2, over_selection=0.0)
    first = [event.reported for event in searched(scene)]
    again = Scene(tmp_path / "again.sqlite", *(FakeDevice(name) for name in "edcba"))
    assert again.run(rounds=12, per_round=2, over_selection=0.0).rounds == 12
    assert [event.reported for event in searched(again)] == first
    assert {name for names in first for name in names} == set("abcde")
    assert len(set(first)) > 3
    other = Scene(tmp_path / "other.sqlite", *(FakeDevice(name) for name in "abcde"))
    other.run(run="other", rounds=12, per_round=2, over_selection=0.0)
    assert [event.reported for event in searched(other)] != first


def test_a_lost_device_is_replaced_by_the_next(scene: Scene) -> None:
    scene.when(closed(0), lambda: setattr(scene.clients["a"], "down", True))
    scene.run(rounds=8, per_round=4, over_selection=0.0)
    assert all(len(event.reported) == 4 for event in searched(scene))


def test_rounds_smaller_than_the_method_needs_are_refused(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedbpt.aggregation.pooled.reports_needed", lambda *_: 3)
    with raises(ConfigError, field="per_round", limit=3):
        scene.federation(per_round=2)


@pytest.mark.timeout(60)
def test_a_round_that_cannot_reach_its_quorum_with_its_own_devices_ends(scene: Scene) -> None:
    federation = scene.federation(rounds=2, quorum=1.0, deadline_s=HOUR)

    def leave_out() -> None:
        federation._ledger.state.left_out.update("de")
        scene.devices["a"].fail = ValueError("broken")

    scene.when(closed(0), leave_out)
    with raises(QuorumError, limit=3):
        federation.run()


# --- mini-batches by speed -----------------------------------------------------------------------------------------


def test_the_median_device_scores_the_usual_mini_batch() -> None:
    pace = TextPace()
    assert pace.batch_size("a", 8) == 8
    for name, seconds in (("fast", 2.0), ("usual", 8.0), ("slow", 32.0), ("stuck", 8000.0), ("server", 0.008)):
        pace.took(name, seconds, n_texts=8)
    sizes = {name: pace.batch_size(name, 8) for name in ("fast", "usual", "slow", "stuck", "server", "new")}
    assert sizes == {"fast": 32, "usual": 8, "slow": 2, "stuck": 1, "server": 32, "new": 8}


def test_slow_devices_get_smaller_mini_batches_from_the_second_round_on(scene: Scene) -> None:
    for name, seconds in zip("abcde", (4.0, 1.0, 1.0, 1.0, 0.5), strict=True):
        scene.devices[name].change = lambda report, s=seconds: msgspec.structs.replace(report, seconds=s)
    scene.run(rounds=3, even_rounds=True)
    sizes = {name: [plan.batch_size for plan in device.plans] for name, device in scene.devices.items()}
    assert sizes == {"a": [None, 8, 2, 2], **{name: [None, 8, 8, 8] for name in "bcd"}, "e": [None, 8, 16, 16]}
    scene.run("other", rounds=2)
    assert {plan.batch_size for plan in scene.devices["a"].plans[4:]} == {None}


def test_a_stopped_run_resumes_to_the_same_digest_and_mini_batches(scene: Scene, tmp_path: Path) -> None:
    def steady(report: Any) -> Any:
        return msgspec.structs.replace(report, seconds=1.0 + (report.device == "a"))

    settings = {"rounds": 5, "even_rounds": True, "per_round": 3, "over_selection": 0.0}
    other = Scene(tmp_path / "other.sqlite", *(FakeDevice(name) for name in "abcde"))
    for each in (scene, other):
        for device in each.devices.values():
            device.change = steady
    whole = scene.run(**settings)
    other.when(closed(3), stop)
    with pytest.raises(StopRunError):
        other.run(**settings)
    assert other.run(**settings).digest == whole.digest
    asked = [
        {name: {plan.round: plan.batch_size for plan in device.plans} for name, device in each.devices.items()}
        for each in (scene, other)
    ]
    assert asked[0] == asked[1]


# --- the end -------------------------------------------------------------------------------------------------------


def test_a_device_that_leaves_after_the_run_is_not_lost() -> None:
    told: list[str] = []

    def nothing(*_: object) -> None:
        pass

    listener = Listener(
        lost=lambda name, *_: told.append(name),
        back=nothing,
        reported=nothing,
        late=nothing,
        progress=nothing,
        connected=nothing,
    )

    async def run() -> None:
        clients = {name: FlakyClient(FakeDevice(name)) for name in "ab"}
        fleet = Fleet(clients, ToyTask().identity, listener, Pace(0.0))
        await fleet.connect()
        fleet.refuse({"a": "a report of another round"})
        await fleet.cancel_rounds()
        fleet.refuse({"b": "it was cancelled"})
        await fleet.aclose()

    asyncio.run(run())
    assert told == ["a"]
