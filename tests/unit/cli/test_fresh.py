"""``--fresh``: the stored run is kept until the new one has closed a round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedbpt import cli
from fedbpt.aggregation.pooled import Pooled
from fedbpt.coordinator.federation import Federation
from fedbpt.device.agent import AgentService
from fedbpt.device.agent.server import AgentServer
from fedbpt.errors import DataError, FedbptError, FederationError, QuorumError
from fedbpt.runs.result import RunResult
from fedbpt.runs.store import RunStore
from tests.support.fake_device import FakeDevice
from tests.support.toy_scene import D, Scene, StopRunError, ToyTask, closed, settings, stop
from tests.support.toy_task import TASK, TASK_FILE

pytestmark = pytest.mark.slow


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path / "runs.db", *(FakeDevice(name) for name in "abc"))
    yield scene
    scene.store.close()


def anew(scene: Scene, **changes: Any) -> RunResult:
    chosen = settings(**changes)
    search = Pooled(D, popsize=chosen.popsize, seed=chosen.seed)
    clients = list(scene.clients.values())
    return Federation(clients, ToyTask(), chosen, search, scene.store, "r", scene.on_event, fresh=True).run()


def everything(store: RunStore) -> tuple[Any, ...]:
    """Everything that a store has of the run."""
    reports = [stored.reports for stored in store.rounds("r")]
    return store.get_run("r"), store.history("r"), store.traffic("r"), store.devices("r"), reports


def out_of_reach(scene: Scene) -> None:
    for client in scene.clients.values():
        client.down = True


def of_different_models(scene: Scene) -> None:
    scene.devices["b"].fingerprint = "sha256:other"


def without_work(scene: Scene) -> None:
    for device in scene.devices.values():
        device.fail = DataError("nothing to score")


@pytest.mark.parametrize(
    ("trouble", "error"),
    [(out_of_reach, QuorumError), (of_different_models, FederationError), (without_work, QuorumError)],
)
def test_a_run_is_kept_if_its_successor_closes_no_round(
    scene: Scene, trouble: Callable[[Scene], None], error: type[FedbptError]
) -> None:
    scene.run()
    before = everything(scene.store)
    trouble(scene)
    with pytest.raises(error):
        anew(scene, seed=9)
    assert everything(scene.store) == before
    assert [run.run for run in scene.store.list_runs()] == ["r"]


def test_a_run_is_kept_if_its_successor_is_killed_before_its_first_round(scene: Scene) -> None:
    result = scene.run()
    before = everything(scene.store)
    scene.store.set_aside("r")  # as a process does that is killed then
    scene.store.create_run(
        "r", task="toy", model_fingerprint="f", model_name="m", identity="i", settings=b"", devices=("a",)
    )
    assert [run.run for run in scene.store.list_runs()] == ["r", "r~"]
    assert scene.run() == result
    assert everything(scene.store) == before


def test_a_run_is_replaced_with_its_successors_first_round(scene: Scene) -> None:
    old = scene.run()
    scene.when(closed(0), stop)
    with pytest.raises(StopRunError):
        anew(scene, seed=9)
    (left,) = scene.store.list_runs()
    assert (left.run, left.status, left.n_rounds, left.result) == ("r", "stopped", 1, None)
    resumed = scene.run(seed=9)
    assert resumed.digest == scene.run("whole", seed=9).digest != old.digest


def test_a_fresh_run_starts_over_even_if_the_stored_one_is_finished(scene: Scene) -> None:
    result = scene.run()
    n_plans = len(scene.devices["a"].plans)
    again = anew(scene)
    assert again.digest == result.digest
    assert len(scene.devices["a"].plans) == 2 * n_plans
    assert [run.run for run in scene.store.list_runs()] == ["r"]


def test_a_fresh_run_needs_no_stored_one(scene: Scene) -> None:
    assert anew(scene).rounds == 4


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A finished run in the default store of this folder, and the command that made it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.toml").write_text(TASK_FILE)
    (tmp_path / "run.toml").write_text(
        'task = "toy.toml"\nrun = "r"\n[settings]\nrounds = 2\npopsize = 4\ncalibrate = false\n'
        "[settings.prompt]\nd = 4\n[settings.objective]\nreadout_words = 0\n"
    )
    with AgentServer(AgentService(FakeDevice("a", task=TASK.identity))) as server:
        words = ["tune", "run.toml", "--quiet", "--device", server.url]
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 0
        yield words


@pytest.mark.parametrize(
    "more",
    [
        ("--listen", "0.0.0.0:0"),
        ("--listen", "127.0.0.1:0"),
        ("--monitor", "0.0.0.0:0"),
        ("--device", "http://10.0.0.1:8401", "--tokens", "absent.toml"),
        ("--device", "not an address"),
        ("--model", "absent.gguf"),
    ],
    ids=" ".join,
)
def test_a_rejected_command_keeps_the_stored_run(finished: list[str], more: tuple[str, ...]) -> None:
    with RunStore("runs/runs.db") as store:
        before = everything(store)
    with pytest.raises(SystemExit) as ended:
        cli.main([*finished, "--fresh", *more])
    assert ended.value.code != 0
    with RunStore("runs/runs.db") as store:
        assert everything(store) == before
