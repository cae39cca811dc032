"""`RunControl`: pause, resume, stop, another deadline."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedbpt.coordinator.control import RunControl
from fedbpt.errors import ConfigError, RunStopped
from fedbpt.runs.events import DeviceLost, RoundClosed, Steered
from fedbpt.runs.result import RunResult
from tests.support.caller import wait_until
from tests.support.fake_device import FakeDevice
from tests.support.raises import raises
from tests.support.toy_scene import Scene, closed


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path / "runs.db", FakeDevice("a"), FakeDevice("b"))
    yield scene
    scene.store.close()


def in_thread(scene: Scene, control: RunControl) -> tuple[threading.Thread, list[RunResult]]:
    results: list[RunResult] = []
    thread = threading.Thread(target=lambda: results.append(scene.run(control=control)))
    thread.start()
    return thread, results


def test_a_paused_run_begins_no_round_until_it_is_resumed_and_ends_the_same(scene: Scene) -> None:
    undisturbed = scene.run("other").digest
    control = RunControl()
    scene.events.clear()
    scene.when(closed(2), control.pause)
    thread, results = in_thread(scene, control)
    wait_until(lambda: bool(scene.of(Steered)))
    assert [event.round for event in scene.of(RoundClosed)] == [0, 1, 2]
    control.resume()
    thread.join(60)
    assert [event.paused for event in scene.of(Steered)] == [True, False]
    assert results[0].digest == undisturbed


def test_a_paused_run_can_be_stopped(scene: Scene) -> None:
    control = RunControl()
    control.pause()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            scene.run(control=control)
        except RunStopped as stopped:
            failures.append(stopped)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: bool(scene.of(Steered)))
    control.stop()
    thread.join(60)
    assert (len(failures), scene.of(RoundClosed)) == (1, [])


def test_a_stopped_run_keeps_its_rounds_and_resumes_to_the_same_digest(scene: Scene) -> None:
    undisturbed = scene.run("other").digest
    control = RunControl()
    scene.when(closed(2), control.stop)
    with raises(RunStopped):
        scene.run(control=control)
    stored = scene.store.get_run("r")
    assert (stored.status, stored.n_rounds, control.stopped) == ("stopped", 3, True)
    assert scene.run().digest == undisturbed


def test_a_run_stopped_before_it_begins_does_not_begin(scene: Scene) -> None:
    control = RunControl()
    control.stop()
    with pytest.raises(RunStopped):
        scene.run(control=control)
    assert scene.events == []


def test_a_stop_ends_an_open_round(scene: Scene) -> None:
    scene.devices["a"].gate.clear()
    control = RunControl()
    threading.Timer(0.2, control.stop).start()
    with pytest.raises(RunStopped):
        scene.run(control=control, deadline_s=3600.0)
    scene.devices["a"].gate.set()


def test_a_stop_after_the_end_has_no_effect(scene: Scene) -> None:
    control = RunControl()
    scene.run(control=control)
    control.stop()


def test_cancelling_a_run_under_control_raises_cancelled_error() -> None:
    async def main() -> None:
        work = asyncio.ensure_future(RunControl().unless_stopped(asyncio.sleep(3600)))
        await asyncio.sleep(0)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(main())


def test_a_changed_deadline_applies_from_the_next_round(scene: Scene) -> None:
    control = RunControl()

    def change() -> None:
        control.set_deadline(1.5)
        scene.devices["b"].gate.clear()

    scene.when(closed(1), change)
    scene.run(control=control, rounds=2, deadline_s=3600.0, stragglers=0.0)
    scene.devices["b"].gate.set()
    assert [(event.paused, event.deadline_s) for event in scene.of(Steered)] == [(False, 1.5)]
    assert " 1.5 s" in scene.of(DeviceLost)[0].reason


def test_a_finished_run_is_returned_whatever_its_deadline_was(scene: Scene) -> None:
    control = RunControl()
    control.set_deadline(7.0)
    first = scene.run(control=control)
    scene.events.clear()
    assert (scene.run(), scene.of(RoundClosed)) == (first, [])


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_an_invalid_deadline_is_refused(seconds: float) -> None:
    control = RunControl()
    with raises(ConfigError, field="deadline_s"):
        control.set_deadline(seconds)
    assert control.wish.deadline_s is None
