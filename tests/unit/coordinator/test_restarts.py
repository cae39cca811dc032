"""A search out of patience restarts with the rest of the budget."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbpt.errors import ConfigError
from fedbpt.protocol.rounds import PooledWork
from fedbpt.runs.events import Evaluated, RoundClosed
from fedbpt.runs.settings import RunSettings
from tests.support.raises import raises
from tests.support.toy_scene import StopRunError, stop
from tests.unit.coordinator.test_federation_fit import FitScene, same
from tests.unit.coordinator.test_patience import SETTINGS, judged

pytestmark = pytest.mark.slow

RESTARTS: dict[str, Any] = {**SETTINGS, "rounds": 40, "restarts": 2}


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[FitScene]:
    scene = FitScene(tmp_path / "runs.sqlite")
    yield scene
    scene.store.close()


def works(scene: FitScene) -> list[PooledWork]:
    """The work of the search that device a gets from now on."""
    seen: list[PooledWork] = []
    device, run = scene.devices["a"], scene.devices["a"].run

    def spy(plan: Any, *rest: Any) -> Any:
        seen.extend([plan.work] if isinstance(plan.work, PooledWork) else [])
        return run(plan, *rest)

    device.run = spy
    return seen


def test_a_search_restarts_from_the_best_mean_and_keeps_the_best_of_all(scene: FitScene) -> None:
    once = scene.run("once", **{**RESTARTS, "restarts": 0})
    scene.events.clear()
    asked = works(scene)
    again = scene.run("again", **RESTARTS)
    assert once.rounds < again.rounds
    began = [i for i in range(1, len(asked)) if asked[i].state.sigma == 1.0]
    assert len(began) == 2
    assert all((asked[i].state.scales.numpy() == 1.0).all() for i in began)
    assert [work.generation for work in asked] == list(range(again.rounds))
    first = began[0]
    assert first == once.rounds
    np.testing.assert_allclose(asked[first].state.mean.numpy(), once.latent, rtol=1e-6)
    best = min(judged(scene), key=lambda pair: pair[1])[0]
    assert (again.latent == once.latent).all() == (best < first)


def test_the_result_is_the_mean_of_the_lowest_dev_loss(scene: FitScene) -> None:
    result = scene.run(**RESTARTS)
    best = min(judged(scene), key=lambda pair: pair[1])
    until_best = scene.run("until", **{**RESTARTS, "rounds": best[0]})
    assert result.mean == until_best.mean
    assert result.fits == until_best.fits


@pytest.mark.parametrize("kind", [RoundClosed, Evaluated])
def test_a_run_with_restarts_stopped_anywhere_resumes_to_the_same_result(scene: FitScene, kind: type[Any]) -> None:
    whole = scene.run("whole", **RESTARTS)
    count = len(scene.of(kind))
    assert count > 8
    for number in range(4, count, 3):
        scene.events.clear()
        seen: list[object] = []

        def wanted(event: object, seen: list[object] = seen, number: int = number) -> bool:
            seen.extend([event] if isinstance(event, kind) else [])
            return isinstance(event, kind) and len(seen) == number

        scene.when(wanted, stop)
        with pytest.raises(StopRunError):
            scene.run(f"stopped-{number}", **RESTARTS)
        same(scene.run(f"stopped-{number}", **RESTARTS), whole)


def test_a_larger_budget_goes_on_with_the_restarted_search(scene: FitScene) -> None:
    whole = scene.run("whole", **RESTARTS)
    for rounds in (9, 15, RESTARTS["rounds"]):
        found = scene.run("in-parts", **{**RESTARTS, "rounds": rounds})
    same(found, whole)


def test_without_restarts_a_run_does_not_change(scene: FitScene) -> None:
    assert RunSettings().restarts == 0
    asked = works(scene)
    scene.run(**SETTINGS)
    assert all(work.state.step is not None or work.state.sigma != 1.0 for work in asked[1:])


def test_restarts_need_patience() -> None:
    with raises(ConfigError):
        RunSettings(restarts=1, evaluate_every=2)


def test_patience_may_change_when_a_run_resumes_unless_it_decides_restarts() -> None:
    def identity(**changes: Any) -> str:
        return RunSettings(evaluate_every=2, **changes).identity()

    assert identity(patience=3) == identity(patience=4)
    assert identity(patience=3, restarts=1) != identity(patience=4, restarts=1)
    assert identity(patience=3, restarts=1) != identity(patience=3)
