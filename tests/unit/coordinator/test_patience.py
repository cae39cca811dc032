"""`patience`: development rows end a search that no longer improves, and choose its mean."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedbpt.errors import ConfigError
from fedbpt.runs.events import Evaluated, RoundClosed, RunStarted
from fedbpt.runs.settings import RunSettings
from tests.support.raises import raises
from tests.support.toy_scene import StopRunError, stop
from tests.unit.coordinator.test_federation_fit import FitScene

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {"rounds": 60, "evaluate_every": 2, "patience": 3, "baselines": False}


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[FitScene]:
    scene = FitScene(tmp_path / "runs.sqlite")
    yield scene
    scene.store.close()


def judged(scene: FitScene) -> list[tuple[int, float]]:
    """(rounds of the search, dev loss of its mean without a readout) of the last run's evaluations."""
    searched = {event.round: event.searched for event in scene.of(RoundClosed)}
    history = scene.store.history(scene.of(RunStarted)[-1].run)
    losses = {line.round: line.metrics["judged_loss"] for line in history if "judged_loss" in line.metrics}
    return [(searched[round], loss) for round, loss in losses.items() if round]


def test_a_search_out_of_patience_ends_with_the_best_mean(scene: FitScene) -> None:
    result = scene.run(**SETTINGS)
    found = judged(scene)
    best = min(found, key=lambda pair: pair[1])
    assert result.rounds == best[0] + 2 * 3 < 60
    assert [rounds for rounds, _ in found] == list(range(2, result.rounds + 1, 2))
    until_best = scene.run("until-best", **{**SETTINGS, "rounds": best[0], "patience": 0})
    assert result.mean == until_best.mean
    assert result.fits == until_best.fits  # the readout is that mean's
    assert result.tuned == until_best.tuned


def test_without_patience_dev_rows_decide_nothing(scene: FitScene) -> None:
    watched = scene.run("watched", **{**SETTINGS, "rounds": 12, "patience": 0})
    alone = scene.run("alone", **{**SETTINGS, "rounds": 12, "patience": 0, "evaluate_every": 0})
    assert (watched.mean, watched.digest) == (alone.mean, alone.digest)


def test_a_finished_run_goes_on_with_another_patience(scene: FitScene) -> None:
    first = scene.run(**SETTINGS)
    longer = scene.run(**{**SETTINGS, "patience": 0, "rounds": first.rounds})
    alone = scene.run("alone", **{**SETTINGS, "patience": 0, "rounds": first.rounds})
    assert longer.mean == alone.mean != first.mean
    assert longer.fits == alone.fits != first.fits
    assert scene.run(**SETTINGS).fits == first.fits  # and back, past both readouts


@pytest.mark.parametrize("kind", [RoundClosed, Evaluated])
@pytest.mark.parametrize("number", [2, 4, 5, 6])
def test_a_run_stopped_near_an_evaluation_resumes_to_the_same_result(
    scene: FitScene, kind: type[Any], number: int
) -> None:
    whole = scene.run("whole", **SETTINGS)
    evaluations = len(judged(scene))
    scene.events.clear()
    seen: list[object] = []

    def wanted(event: object) -> bool:
        searching = isinstance(event, kind) and (not isinstance(event, RoundClosed) or event.purpose == "search")
        seen.extend([event] if searching else [])
        return searching and len(seen) == number

    scene.when(wanted, stop)
    with pytest.raises(StopRunError):
        scene.run("stopped", **SETTINGS)
    resumed = scene.run("stopped", **SETTINGS)
    for name in ("mean", "digest", "rounds", "fits", "tuned"):
        assert getattr(resumed, name) == getattr(whole, name), name
    evaluated = [line for line in scene.store.history("stopped") if "dev_loss" in line.metrics]
    assert len(evaluated) == 1 + evaluations + 1  # zero-shot, and the result
    assert {name: score.accuracy for name, score in resumed.dev.items()} == {
        name: score.accuracy for name, score in whole.dev.items()
    }


def test_patience_needs_evaluations() -> None:
    with raises(ConfigError):
        RunSettings(patience=3, evaluate_every=0)
