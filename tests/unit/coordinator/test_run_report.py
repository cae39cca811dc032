"""A run's report: quality under a budget, cost to a target, and what faults cost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedbpt.cli.run_report import report_json, report_page, sections
from fedbpt.coordinator.monitoring.run_report import report_of
from fedbpt.errors import StoreError
from fedbpt.runs.events import RoundClosed
from tests.unit.coordinator.test_layer_runs import LayerScene


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LayerScene]:
    made = LayerScene(tmp_path_factory.mktemp("report") / "runs.sqlite")
    made.run(rounds=8, evaluate_every=2, stop_if_futile=False)
    yield made
    made.store.close()


def test_the_totals_are_those_of_the_run(scene: LayerScene) -> None:
    found = report_of(scene.store, "r", watts=4.0)
    last = scene.of(RoundClosed)[-1]
    assert (found.total.evaluations, found.total.tokens) == (last.evaluations, last.tokens)
    assert (found.total.bytes_up, found.total.bytes_down) == (last.bytes_up, last.bytes_down)
    assert found.total.seconds == pytest.approx(last.seconds, rel=0.5)  # which leaves out the selection
    assert found.total.joules == pytest.approx(4.0 * found.total.device_seconds)
    assert found.peak_rss_bytes >= 0


def test_quality_grows_with_the_budget(scene: LayerScene) -> None:
    found = report_of(scene.store, "r")
    assert len(found.points) >= 4
    for resource in ("bytes_up", "seconds", "tokens"):
        mine = [each for each in found.budgets if each.resource == resource]
        best = [-1.0 if each.best is None else each.best.figure for each in mine]
        assert best == sorted(best)
        assert best[-1] == max(point.figure for point in found.points)
        for each in mine:
            assert each.best is None or getattr(each.best.spent, resource) <= each.budget
    assert not [each for each in found.budgets if each.resource == "joules"]  # the power is unknown


def test_the_cost_to_a_target_is_that_of_the_first_evaluation_that_reached_it(scene: LayerScene) -> None:
    points = report_of(scene.store, "r").points
    target = max(point.figure for point in points)
    reached = report_of(scene.store, "r", target=target).reached
    assert reached == next(point for point in points if point.figure >= target)
    assert report_of(scene.store, "r", target=1.1).reached is None


def test_reports_that_are_missing_and_devices_that_were_lost_are_counted(
    tmp_path: Path,
) -> None:
    made = LayerScene(tmp_path / "runs.sqlite")
    whole = made.run("whole", rounds=3)
    assert report_of(made.store, "whole").faults.lost == {}
    assert report_of(made.store, "whole").faults.counted == report_of(made.store, "whole").faults.expected

    def fail(event: object) -> None:
        if isinstance(event, RoundClosed) and event.purpose == "search":
            made.clients["b"].down = True

    made.on_event = fail
    made.run("faulty", rounds=3, deadline_s=3.0)
    faults = report_of(made.store, "faulty").faults
    assert faults.lost["b"][0] >= 1
    assert faults.counted < faults.expected
    assert whole.rounds == 3
    made.store.close()


def test_the_page_and_the_json_tell_the_same(scene: LayerScene) -> None:
    found = report_of(scene.store, "r", target=0.1, watts=4.0)
    titles = [title for title, _, _ in sections(found)]
    page = report_page(found)
    assert all(title in page for title in titles)
    assert json.loads(json.dumps(report_json(found)))["total"]["tokens"] == found.total.tokens


def test_an_unknown_run_has_no_report(scene: LayerScene) -> None:
    with pytest.raises(StoreError):
        report_of(scene.store, "absent")
