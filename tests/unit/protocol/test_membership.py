"""A device whose rows are of another task is excluded by name, and the run continues without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fedbpt.coordinator.ledger import identity_of
from fedbpt.device.device import Device
from fedbpt.errors import ConfigError, InputError, QuorumError
from fedbpt.protocol.membership import misfit
from fedbpt.protocol.rounds import SelectWork
from fedbpt.protocol.task_identity import TaskIdentity
from fedbpt.runs.events import DeviceBack, DeviceLost
from fedbpt.tasks import Task, Template
from tests.support.fake_device import TOY, FakeDevice
from tests.support.toy_scene import Scene, closed, settings
from tests.support.toy_scorer import ToyScorer
from tests.unit.device.test_device import LABELS, ROWS, TASK, TEMPLATE, local, plan, pooled, request

OTHERS = {
    "another name": TaskIdentity.of("sst-2", ("x", "y")),
    "labels in another order": TaskIdentity.of("toy", ("y", "x")),
    "a label more": TaskIdentity.of("toy", ("x", "y", "z")),
    "a label less": TaskIdentity.of("toy", ("x",)),
    "another label": TaskIdentity.of("toy", ("x", "Y")),
    "other columns": TaskIdentity.of("toy", ("x", "y"), [["body"], "label", None]),
    "unknown, of an older version": None,
}


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path / "runs.db", FakeDevice("a"), FakeDevice("b"), FakeDevice("c", target=2.0))
    with made.store:
        yield made


def of_task(**changes: Any) -> Task:
    words = tuple(f" {label}" for label in changes.get("labels", LABELS))
    return msgspec.structs.replace(TASK, templates=(Template(pattern=TEMPLATE.pattern, label_words=words),), **changes)


@pytest.mark.parametrize("other", OTHERS)
def test_a_device_with_another_task_is_named_and_the_others_go_on(scene: Scene, tmp_path: Path, other: str) -> None:
    scene.devices["b"].task = OTHERS[other]
    result = scene.run(evaluate_every=2)
    two = Scene(tmp_path / "two.db", FakeDevice("a"), FakeDevice("c", target=2.0))
    with two.store:
        assert result.digest == two.run(evaluate_every=2).digest
    assert [device.reports for device in result.devices] == [5, 0, 5]
    assert result.tuned.n == 40
    assert scene.devices["b"].plans == scene.devices["b"].requests == []
    assert {event.device for event in scene.of(DeviceLost)} == {"b"}
    assert set(scene.store.history("r")[0].lost) == {"b"}


def test_its_other_model_does_not_block_the_start_either(scene: Scene) -> None:
    scene.devices["b"].task, scene.devices["b"].fingerprint = OTHERS["a label more"], "sha256:other"
    assert scene.run().devices[1].reports == 0


def test_if_too_few_devices_have_the_task_the_error_names_the_others(scene: Scene) -> None:
    scene.devices["a"].task = scene.devices["b"].task = OTHERS["another name"]
    with pytest.raises(QuorumError, match=r"1 of 3 .*\(a: .*sst-2.*; b: .*sst-2"):
        scene.run()
    assert scene.store.find_run("r") is None


def test_a_run_needs_no_test_rows_of_devices_with_another_task(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.devices["b"].task = OTHERS["another name"]
    for name in "ac":
        info = msgspec.structs.replace(scene.devices[name].info(), n_test=0)
        monkeypatch.setattr(scene.devices[name], "info", lambda info=info: info)
    assert scene.run().tuned.n == 0


def test_a_device_restarted_with_the_task_takes_part(scene: Scene) -> None:
    scene.devices["b"].task = OTHERS["other columns"]

    def restart() -> None:
        scene.devices["b"].task = TOY
        scene.clients["b"].restart(graceful=True)

    scene.when(closed(0), restart)
    for device in scene.devices.values():
        device.slow_s = 0.1
    assert scene.run(rounds=8).devices[1].reports > 0
    assert [event.device for event in scene.of(DeviceBack)] == ["b"]


def test_a_device_restarted_with_another_task_is_excluded_from_then_on(scene: Scene) -> None:
    def restart() -> None:
        scene.devices["b"].task = OTHERS["labels in another order"]
        scene.clients["b"].restart(graceful=False)

    scene.when(closed(1), restart)
    for device in scene.devices.values():
        device.slow_s = 0.05
    assert [device.reports for device in scene.run(rounds=6).devices] == [7, 2, 7]
    assert "labels" in scene.of(DeviceLost)[0].reason


# --- stored runs -----------------------------------------------------------------------------------------------------

COLUMNS: dict[str, Any] = {"text_columns": ("body",)}


def session(scene: Scene, **changes: Any) -> None:
    """Run two more rounds with this task on the device and the coordinator."""
    task = of_task(**changes)
    scene.devices["a"].task = task.identity
    done = scene.store.find_run("r")
    scene.run(task=task, rounds=2 + (done.n_rounds if done else 0))


@pytest.fixture
def one_device(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path / "one.db", FakeDevice("a"))
    with made.store:
        yield made


@pytest.mark.parametrize(
    "changes", [{"label_column": "class"}, {"max_words": 7}, {"labels": LABELS[::-1]}, {"name": "other"}, {}]
)
def test_a_run_is_not_resumed_with_another_task_or_other_columns(one_device: Scene, changes: dict[str, Any]) -> None:
    session(one_device, **COLUMNS)
    session(one_device, **COLUMNS)
    with pytest.raises(ConfigError, match="another task"):
        session(one_device, **{**COLUMNS, **changes} if changes else {})


def test_a_run_of_the_previous_version_resumes_and_records_its_columns(one_device: Scene) -> None:
    session(one_device, **COLUMNS)
    before = identity_of(settings(rounds=2), of_task(**COLUMNS), reads=False)
    with one_device.store._transaction() as db:
        db.execute("UPDATE runs SET identity = ?", (before,))
    session(one_device, **COLUMNS)
    assert one_device.store.get_run("r").identity != before
    with pytest.raises(ConfigError, match="another task"):
        session(one_device)


# --- the device's side -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [other for other in OTHERS.values() if other is not None])
def test_a_device_does_no_work_for_another_task(other: TaskIdentity) -> None:
    own = Device("pi5", ToyScorer(), ROWS, ROWS, ROWS, task=TASK)
    for work in (pooled(), local(), SelectWork(templates=(TEMPLATE,))):
        with pytest.raises(InputError, match=r"pi5.*task"):
            own.run(plan(work, task=other))
    with pytest.raises(InputError, match=r"pi5.*task"):
        own.evaluate(request(task=other))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "tone"},
        {"labels": ("good", "bad")},
        {"labels": ("bad", "good", "so-so")},
        {"text_columns": ("title", "text")},
        {"label_column": "class"},
        {"max_words": 60},
    ],
)
def test_a_task_differs_by_its_name_its_labels_and_how_rows_are_read(changes: dict[str, Any]) -> None:
    info = Device("pi5", ToyScorer(), ROWS, task=of_task(**changes)).info()
    found = misfit(info, ToyScorer().fingerprint, TASK.identity)
    assert found is not None
    assert found.code == "wrong-task"
    assert "good" not in found.reason
    assert misfit(info, ToyScorer().fingerprint, of_task(**changes).identity) is None


def test_templates_and_the_length_of_texts_come_with_the_run() -> None:
    own = msgspec.structs.replace(TASK, templates=TASK.templates[:1], max_text_tokens=7)
    assert misfit(Device("pi5", ToyScorer(), ROWS, task=own).info(), None, TASK.identity) is None
