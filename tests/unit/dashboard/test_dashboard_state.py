"""`RunState`: from a run's events and store, or only from its store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from fedbpt.coordinator.control import RunControl
from fedbpt.dashboard.state import RunState, try_to_refresh
from fedbpt.dashboard.views import DeviceView
from fedbpt.errors import DeviceUnreachableError
from fedbpt.runs.event_log import Journal, Logged
from fedbpt.runs.events import (
    DeviceBack,
    DeviceLeftOut,
    DeviceLost,
    Event,
    LateReport,
    Progressed,
    RoundClosed,
    Steered,
)
from fedbpt.runs.store import RunStore, StoredRun, Traffic
from tests.support.fake_device import FakeDevice
from tests.support.toy_scene import Scene, StopRunError, closed, stop
from tests.unit.coordinator.test_federation_fit import FitScene


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path / "runs.db", FakeDevice("a"), FakeDevice("b", target=1.5))
    yield scene
    scene.store.close()


def stored(scene: Scene) -> RunState:
    """The current view, only from the store."""
    state = RunState("r")
    state.refresh(scene.store)
    return state


def device(state: RunState, name: str) -> DeviceView:
    return next(found for found in state.view().devices if found.name == name)


def test_without_a_run_nothing_is_shown(scene: Scene) -> None:
    view = stored(scene).view()
    assert (view.status, view.searched, view.figure, view.devices) == ("waiting", 0, None, ())


def test_a_finished_run_shows_its_result_on_development_rows(scene: Scene) -> None:
    result = scene.run(evaluate_every=2)
    state = stored(scene)
    view = state.view()
    assert (view.status, view.share, view.eta_s) == ("finished", 1.0, None)
    dev, test = result.scores("dev"), result.scores("test")
    assert (view.figure, view.zero_shot) == (dev["tuned"].accuracy, dev["zero_shot"].accuracy)
    assert (view.split, view.n_rows, view.interval) == ("dev", 20, dev["tuned"].interval)
    assert state.dev_points()[-1].figure == view.figure  # where the curve ends
    assert [stage.title for stage in view.stages] == ["zero-shot", "tuned"]
    for stage, name in zip(view.stages, ("zero_shot", "tuned"), strict=True):
        assert stage.dev == (dev[name].accuracy, 20, dev[name].interval)
        assert stage.test == (test[name].accuracy, 40, test[name].interval)
    assert (view.searched, view.evaluations, view.tokens) == (4, result.evaluations, result.tokens)
    assert view.seconds == pytest.approx(result.seconds)
    assert (view.bytes_up, view.bytes_down, view.participations) == (result.bytes_up, result.bytes_down, 8)
    assert [(found.name, found.reports, found.status) for found in view.devices] == [("a", 4, "done"), ("b", 4, "done")]
    assert device(state, "a").figure == state.device_figures("a")[-1].value
    assert view.template == result.template.pattern


def test_without_development_rows_the_result_on_test_rows_is_shown(scene: Scene) -> None:
    result = scene.run()
    view = stored(scene).view()
    assert (view.figure, view.zero_shot, view.n_rows) == (result.tuned.accuracy, result.zero_shot.accuracy, 40)
    assert (view.split, view.interval) == ("test", result.tuned.interval)
    assert [(stage.dev, stage.test is None) for stage in view.stages] == [(None, False)] * 2
    assert device(stored(scene), "a").figure == result.devices[0].tuned.accuracy


def test_rounds_on_the_page_are_those_of_the_search_and_so_is_the_time_left(tmp_path: Path) -> None:
    scene = FitScene(tmp_path / "fits.db")
    scene.when(closed_search(2), stop)
    with pytest.raises(StopRunError):
        scene.run(rounds=8, evaluate_every=1)
    state = RunState("r")
    state.refresh(scene.store)
    assert [point.round for point in state.losses()] == [1, 2]
    assert [point.round for point in state.device_losses("a")] == [1, 2]
    assert [point.round for point in state.dev_points()] == [0, 1]
    stages = state.view().stages
    assert [stage.title for stage in stages] == [
        "zero-shot", "calibration only", "readout without prompt", "tuned, without readout", "tuned",
    ]  # fmt: skip
    assert {stage.dev.n for stage in stages if stage.dev} == {8}
    assert (state.view().stage, state.view().path) == (
        None, ("selection", "calibration", "probe", "search", "readout", "evaluation"),
    )  # fmt: skip
    assert state.view().share == 0.25
    scene.store.close()


def closed_search(number: int) -> Callable[[Event], bool]:
    return lambda event: isinstance(event, RoundClosed) and event.searched == number


def test_with_events_the_view_is_the_same_as_from_the_store_only(scene: Scene) -> None:
    state = RunState("r", RunControl())
    journal = Journal(state)

    def hear(event: object) -> None:
        journal(event)  # type: ignore[arg-type]
        if isinstance(event, RoundClosed):
            state.refresh(scene.store)

    scene.on_event = hear
    scene.run(evaluate_every=2)
    state.refresh(scene.store)
    assert msgspec.to_builtins(state.view()) == msgspec.to_builtins(stored(scene).view())
    for curve in ("losses", "device_losses", "device_figures"):
        names = () if curve == "losses" else ("b",)
        assert getattr(state, curve)(*names) == getattr(stored(scene), curve)(*names)
    assert state.dev_points() == stored(scene).dev_points()


def test_curves_have_a_point_a_round_and_the_zero_shot_line_is_round_0(scene: Scene) -> None:
    scene.run(evaluate_every=2)
    state = stored(scene)
    assert [point.round for point in state.losses()] == [1, 2, 3, 4]
    assert [point.round for point in state.dev_points()] == [0, 2, 4]
    assert len({(point.n, point.zero_shot, point.zero_shot_loss) for point in state.dev_points()}) == 1
    assert [point.round for point in state.device_losses("a")] == [1, 2, 3, 4]
    assert [point.round for point in state.device_figures("a")] == [0, 2, 4]
    both = [state.device_losses(name)[0].value for name in ("a", "b")]
    assert state.losses()[0].value == pytest.approx(sum(both) / 2)
    assert both[0] != both[1]


def test_only_new_rounds_are_read(scene: Scene) -> None:
    scene.when(closed(2), stop)
    with pytest.raises(StopRunError):
        scene.run(evaluate_every=2)
    state = stored(scene)
    assert (state.view().status, len(state.losses()), len(state.dev_points())) == ("stopped", 2, 1)
    version = state.version
    state.refresh(scene.store)
    assert state.version == version
    scene.run(evaluate_every=2)  # round 2 is evaluated first, round 3 and 4 follow
    state.refresh(scene.store)
    assert [point.round for point in state.losses()] == [1, 2, 3, 4]
    assert [point.round for point in state.dev_points()] == [0, 2, 4]
    assert state.view() == stored(scene).view()


def test_a_new_run_of_the_same_name_replaces_the_old_one(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.run()
    state = stored(scene)
    scene.store.delete_run("r")
    monkeypatch.setattr("fedbpt.runs.store._now", lambda: "2030-01-01T00:00:00+00:00")
    scene.run(rounds=1)
    state.refresh(scene.store)
    assert (state.view().searched, len(state.losses())) == (1, 1)


def test_a_run_that_is_replaced_while_it_is_read_is_shown(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.run()
    traffic = type(scene.store).traffic

    def replaced(store: RunStore, run: str) -> dict[str, Traffic]:
        return {name: found for name, found in traffic(store, run).items() if name != "a"}

    monkeypatch.setattr(type(scene.store), "traffic", replaced)
    state = stored(scene)
    assert [device(state, name).bytes_up > 0 for name in "ab"] == [False, True]


def test_a_page_that_cannot_be_read_does_not_stop_the_others(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scene.run()
    states = [RunState("broken"), RunState("r")]
    find = type(scene.store).find_run

    def found(store: RunStore, run: str) -> StoredRun | None:
        return find(store, {"r": "r"}[run])

    monkeypatch.setattr(type(scene.store), "find_run", found)
    for state in states:
        try_to_refresh(state, scene.store)
    assert [state.view().status for state in states] == ["waiting", "finished"]
    assert [record.exc_info is not None for record in caplog.records if "broken" in record.getMessage()] == [True]


def test_a_lost_device_is_shown_with_its_reason_until_it_is_back(scene: Scene) -> None:
    scene.run(rounds=1)
    state = RunState("r", RunControl())
    state.refresh(scene.store)
    journal = Journal(state)
    journal(next(event for event in scene.events if hasattr(event, "live")))
    urgent = state.urgent
    journal(DeviceLost(device="b", round=2, reason="b (http://pi5:8401) cannot be reached"))
    assert device(state, "b").detail == "cannot be reached"
    journal(DeviceLost(device="b", round=2, reason="b: it does not answer"))
    assert (device(state, "b").status, device(state, "b").detail) == ("lost", "it does not answer")
    assert (state.view().live, state.urgent != urgent) == (1, True)
    journal(DeviceBack(device="b", round=3))
    assert device(state, "b").status == "live"
    assert [notice.text for notice in state.view().notices] == [
        "b is back",
        "b is lost: it does not answer",
        "b is lost: cannot be reached",
    ]


def test_a_device_without_heartbeat_is_silent_at_once(scene: Scene) -> None:
    scene.run(rounds=1)
    state = RunState("r", RunControl())
    state.refresh(scene.store)
    Journal(state)(scene.events[0])
    urgent = state.urgent
    state.set_responding("a", True)
    assert state.urgent == urgent
    state.set_responding("a", False)
    assert (device(state, "a").status, state.urgent != urgent) == ("silent", True)
    state.set_responding("a", True)
    assert device(state, "a").status == "live"


def test_progress_pauses_and_device_status_are_shown() -> None:
    state = RunState("r", RunControl())
    state.set_info("a", msgspec.structs.replace(FakeDevice("a").info(), celsius=61.0, battery=83.0))
    assert (device(state, "a").celsius, device(state, "a").battery) == (61.0, 83.0)
    journal = Journal(state)
    journal(Progressed(device="a", round=1, done=3, total=8))
    assert (device(state, "a").status, device(state, "a").detail) == ("live", "3 of 8")
    journal(Progressed(device="a", round=1, done=3, total=8, paused="on battery"))
    assert (device(state, "a").status, device(state, "a").detail) == ("paused", "on battery")


def test_a_device_lost_in_the_last_round_is_shown_by_other_processes(scene: Scene) -> None:
    scene.devices["b"].fail = DeviceUnreachableError("b went away")
    scene.when(closed(2), stop)
    with pytest.raises(StopRunError):
        scene.run()
    scene.store.set_status("r", "running")
    state = stored(scene)
    assert device(state, "b").status == "lost"
    assert device(state, "a").status == "live"
    state.refresh(scene.store)  # again: it is told once
    said = [notice for notice in state.view().notices if "b is lost" in notice.text]
    assert len({notice.text for notice in said}) == len(said) > 0
    assert "went away" in said[0].text
    assert said[0].bad


def test_the_messages_of_a_finished_run_include_devices_that_came_back(scene: Scene) -> None:
    def leave() -> None:
        scene.clients["b"].down = True

    def come_back() -> None:
        scene.clients["b"].down = False

    steps = [(closed(1), leave), (closed(2), come_back)]

    def react(event: Event) -> None:
        if steps and steps[0][0](event):
            steps.pop(0)[1]()

    scene.on_event = react
    scene.devices["a"].slow_s = 0.2  # so that there are rounds left
    assert scene.run(rounds=8).devices[1].reports > 2
    state = stored(scene)
    said = [notice.text for notice in state.view().notices if notice.text.startswith("b ")]
    assert said[0] == "b is back"
    assert said[-1].startswith("b is lost: ")
    notices = state.view().notices
    state._stored = None  # as if all were new
    state.refresh(scene.store)
    assert state.view().notices == notices


def test_a_pause_is_shown_when_requested_and_when_it_takes_effect(scene: Scene) -> None:
    scene.run(rounds=1)
    control = RunControl()
    state = RunState("r", control)
    state.refresh(scene.store)
    journal = Journal(state)
    journal(scene.events[0])
    control.pause()
    assert state.view().status == "pausing"
    journal(Steered(paused=True, deadline_s=30.0))
    assert (state.view().status, state.view().deadline_s) == ("paused", 30.0)
    control.resume()
    journal(Steered(paused=False, deadline_s=30.0))
    assert state.view().status == "running"
    assert [notice.text for notice in state.view().notices] == ["resumed", "round deadline changed to 30 s", "paused"]
    state.stopped()
    assert state.view().status == "stopped"


def test_a_device_that_is_left_out_is_absent_and_named_once() -> None:
    state = RunState("r", RunControl())
    Journal(state)(DeviceLeftOut(device="a", round=3, reason="left out of the readout"))
    view = state.view()
    assert [notice.text for notice in view.notices] == ["a: left out of the readout"]
    assert [(device.name, device.status, device.detail) for device in view.devices] == [
        ("a", "absent", "left out of the readout")
    ]


def test_warnings_and_late_reports_are_messages() -> None:
    state = RunState("r", RunControl())
    journal = Journal(state)
    journal(LateReport(device="a", round=3))
    journal(Logged(level="WARNING", logger="fedbpt", message="the disk is full"))
    assert [notice.text for notice in state.view().notices] == [
        "the disk is full",
        "a: a report arrived late and is not used",
    ]


def test_the_time_left_follows_from_the_budget_that_is_spent_and_goes_down(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("fedbpt.dashboard.state.monotonic", lambda: now)
    scene.when(closed(1), stop)
    with pytest.raises(StopRunError):
        scene.run(rounds=4)
    scene.store.set_status("r", "running")
    state = stored(scene)
    assert state.view().share == 0.25
    searching = scene.store.history("r")[1].metrics["seconds"]
    assert state.view().eta_s == pytest.approx(3 * searching)  # what went before the search does not come again
    now += 2 * searching
    assert state.view().eta_s == pytest.approx(searching)
    now += 2 * searching
    assert state.view().eta_s == 0.0
