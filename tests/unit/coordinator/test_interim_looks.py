"""`stop_if_futile`: interim looks at held-out training rows end a search that gains nothing over the probe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedbpt.aggregation.base import Fit
from fedbpt.coordinator.devices.call_times import CallTimes
from fedbpt.coordinator.layer_reading import most_looks
from fedbpt.coordinator.live import LiveEvaluation
from fedbpt.coordinator.planner import Planner
from fedbpt.errors import QuorumError
from fedbpt.protocol.rounds import EvaluateRequest
from fedbpt.runs.events import RoundClosed
from fedbpt.runs.result import Variants
from fedbpt.runs.settings import RunSettings
from tests.support.toy_scene import StopRunError, stop
from tests.support.toy_task import TASK
from tests.unit.coordinator.test_layer_runs import LayerScene, moods, same

pytestmark = pytest.mark.slow

ROUNDS = 44


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[LayerScene]:
    # the text tells the mood, which the probe reads without an error: no prompt can gain much
    scene = LayerScene(tmp_path / "runs.sqlite", {"a": moods(24, 0), "b": moods(24, 50)})
    yield scene
    scene.store.close()


def looks(scene: LayerScene, run: str = "r") -> dict[int, float]:
    """Gains by rounds of the search."""
    searched = {event.round: event.searched for event in scene.of(RoundClosed)}
    history = scene.store.history(run)
    return {searched[line.round]: line.metrics["look_gain"] for line in history if "look_gain" in line.metrics}


def gaining(monkeypatch: pytest.MonkeyPatch, *gains: float | None) -> None:
    left = list(gains)

    async def look(_self: LiveEvaluation) -> float | None:
        return left.pop(0)

    monkeypatch.setattr(LiveEvaluation, "look", look)


def test_a_search_that_gains_nothing_ends_after_a_look(scene: LayerScene) -> None:
    result = scene.run(rounds=ROUNDS, calibrate=True)
    found = looks(scene)
    assert result.futile
    assert list(found) in ([11], [11, 22])
    assert result.rounds == list(found)[-1]
    assert list(found.values())[-1] <= 0 < min([*list(found.values())[:-1], 1.0])
    short = scene.run("short", rounds=result.rounds, stop_if_futile=False)
    assert (short.mean, short.digest, short.layer_fits) == (result.mean, result.digest, result.layer_fits)
    assert short.futile is False


def test_devices_that_were_told_when_to_call_are_all_called_for_a_look(
    scene: LayerScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    gaining(monkeypatch, None, None)
    for kind, name in ((CallTimes, "opened"), (CallTimes, "ask_all"), (LiveEvaluation, "look")):
        method = getattr(kind, name)

        def noted(*given: Any, name: str = name, method: Any = method) -> Any:
            called.append(name)
            return method(*given)

        monkeypatch.setattr(kind, name, noted)
    scene.run(rounds=ROUNDS, per_round=1, over_selection=0.0)
    looked = [i for i, name in enumerate(called) if name == "look"]
    assert len(looked) == 2
    assert all(called[i - 2 : i + 2] == ["opened", "ask_all", "look", "opened"] for i in looked)


def test_a_bias_alone_is_no_gain_of_the_search(scene: LayerScene, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[bool]] = []
    planned = Planner.request

    def request(self: Planner, lines: Variants, **options: Any) -> EvaluateRequest:
        if options.get("split") == "held":
            asked.append([bool(latent.any()) for latent, _ in lines.values()])
        return planned(self, lines, **options)

    monkeypatch.setattr(Planner, "request", request)
    scene.run(rounds=20)
    look, choice = asked
    assert look == [False, True, True]  # the probe, and what has a prompt
    assert choice == [False, False, True, True]


@pytest.mark.parametrize(("rounds", "due"), [(12, []), (15, [10]), (20, [10]), (24, [10, 12]), (100, [25, 50])])
def test_a_look_is_done_where_it_can_save_something(
    scene: LayerScene, monkeypatch: pytest.MonkeyPatch, rounds: int, due: list[int]
) -> None:
    gaining(monkeypatch, 0.1, 0.2)
    scene.run(rounds=rounds)
    assert list(looks(scene)) == due


def test_a_search_that_gains_goes_on(scene: LayerScene, monkeypatch: pytest.MonkeyPatch) -> None:
    gaining(monkeypatch, 0.1, 0.2)
    result = scene.run(rounds=ROUNDS)
    assert (result.rounds, result.futile) == (ROUNDS, False)
    assert looks(scene) == {11: 0.1, 22: 0.2}


def test_the_second_look_can_end_it_too(scene: LayerScene, monkeypatch: pytest.MonkeyPatch) -> None:
    gaining(monkeypatch, 0.1, -0.2)
    result = scene.run(rounds=ROUNDS)
    assert (result.rounds, result.futile) == (22, True)


def test_a_look_that_cannot_measure_decides_nothing(scene: LayerScene, monkeypatch: pytest.MonkeyPatch) -> None:
    gaining(monkeypatch, None, None)
    result = scene.run(rounds=ROUNDS)
    assert (result.rounds, result.futile) == (ROUNDS, False)
    assert looks(scene) == {}


@pytest.mark.parametrize("at", [10, 11, 12])
def test_a_resumed_run_has_the_same_looks(scene: LayerScene, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    gaining(monkeypatch, 0.1, -0.2)
    whole = scene.run("whole", rounds=ROUNDS)
    gaining(monkeypatch, 0.1, -0.2)
    scene.on_event = lambda event: stop() if isinstance(event, RoundClosed) and event.searched == at else None
    with pytest.raises(StopRunError):
        scene.run(rounds=ROUNDS)
    scene.on_event = lambda _event: None
    same(scene.run(rounds=ROUNDS), whole)
    assert looks(scene) == {11: 0.1, 22: -0.2}


def test_an_ended_run_goes_on_without_looks(scene: LayerScene, monkeypatch: pytest.MonkeyPatch) -> None:
    gaining(monkeypatch, -0.1)
    assert scene.run(rounds=ROUNDS).rounds == 11
    assert scene.run(rounds=ROUNDS).rounds == 11
    assert scene.run(rounds=2 * ROUNDS).futile  # and is told how to go on
    longer = scene.run(rounds=ROUNDS, stop_if_futile=False)
    assert (longer.rounds, longer.futile) == (ROUNDS, False)
    assert not scene.run(rounds=ROUNDS).futile  # it did not end early


def test_a_look_whose_devices_are_lost_ends_nothing(scene: LayerScene, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(_self: LiveEvaluation, _fit: Fit) -> None:
        raise QuorumError("1 of 2 devices report, 2 are needed: start them")

    monkeypatch.setattr(LiveEvaluation, "_exchange", fails)
    assert scene.run(rounds=20).rounds == 20
    assert looks(scene) == {}


@pytest.mark.parametrize("changes", [{"rounds": 8}, {"readout": "words"}, {"stop_if_futile": False}])
def test_nothing_looks(scene: LayerScene, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    gaining(monkeypatch)
    result = scene.run(**{"rounds": 20, **changes})
    assert (result.rounds, result.futile) == (changes.get("rounds", 20), False)


def test_an_estimate_counts_looks_where_there_can_be_some() -> None:
    changes: list[dict[str, Any]] = [{}, {"readout": "words"}, {"robust": "median"}, {"stop_if_futile": False}]
    found = [most_looks(TASK.templates, RunSettings(**change), 4, rounds) for change in changes for rounds in (10, 11)]
    assert found == [0, 2, 0, 0, 0, 0, 0, 0]


def test_looks_are_no_part_of_what_a_run_is() -> None:
    assert RunSettings(stop_if_futile=False).identity() == RunSettings().identity()
