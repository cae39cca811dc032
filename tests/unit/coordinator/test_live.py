"""Live figures are those of the result at that moment, on the same rows from start to end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbpt import Budget, PromptSpec, evaluate, tune
from fedbpt.protocol.rounds import EvaluateReport, FitWork, RoundPlan
from fedbpt.runs.dev_figures import DevPoint, dev_points, judged_loss, metrics_of
from fedbpt.runs.events import Evaluated, RoundClosed
from fedbpt.runs.result import BASELINES, Score
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows
from tests.unit.coordinator.test_federation_fit import FitScene, same

DEV = rows(12, first=100)
EVERY_2: dict[str, Any] = {"rounds": 6, "evaluate_every": 2, "baselines": False}


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[FitScene]:
    scene = FitScene(tmp_path / "runs.sqlite")
    yield scene
    scene.store.close()


def shown(scene: FitScene) -> list[Evaluated]:
    return scene.of(Evaluated)


# --- the figure ------------------------------------------------------------------------------------------------------


def test_the_last_figure_is_that_of_the_prompt_that_is_shipped() -> None:
    events: list[Evaluated] = []

    def hear(event: Any) -> None:
        if isinstance(event, Evaluated):
            events.append(event)

    result = tune(
        ToyScorer(), TASK, rows(24), DEV, budget=Budget(evaluations=48), prompt=PromptSpec(d=6, alpha=2.0), popsize=8,
        on_event=hear, show=False,
    )  # fmt: skip
    shipped = evaluate(ToyScorer(), TASK, DEV, result.prompt)
    zero_shot = evaluate(ToyScorer(), TASK, DEV, template=result.template)
    last = events[-1]
    assert (last.score.n, last.score.correct) == (len(DEV), shipped.correct)
    assert last.score.loss == pytest.approx(shipped.loss, rel=1e-5)
    assert {event.zero_shot.correct for event in events} == {zero_shot.correct}
    assert result.dev_curve[-1] == (48, shipped.accuracy)
    assert result.dev_curve[0] == (0, zero_shot.accuracy)
    assert result.run.scores("dev")["tuned"] == last.score
    assert set(result.run.scores("dev")) == {"zero_shot", "calibrated", "probe", "prompt", "read", "tuned"}
    assert f"{zero_shot.accuracy:.3f} → {shipped.accuracy:.3f}" in result._repr_html_()


def test_a_live_figure_is_that_of_a_run_that_ends_there(scene: FitScene) -> None:
    scene.run("whole", **EVERY_2)
    on_the_way = shown(scene)[1:3]
    for rounds, live in zip((2, 4), on_the_way, strict=True):
        scene.events.clear()
        scene.run(f"until-{rounds}", **{**EVERY_2, "rounds": rounds})
        ended = shown(scene)[-1]
        assert (live.zero_shot, live.stages) == (ended.zero_shot, ended.stages)
        assert live.score == ended.score


def test_the_stages_are_measured_on_the_same_rows(scene: FitScene) -> None:
    result = scene.run(**{**EVERY_2, "baselines": True})
    first, *later, last = shown(scene)
    assert (first.round, first.score, first.stages) == (0, first.zero_shot, {})
    assert [set(event.stages) for event in (*later, last)] == [set(BASELINES) - {"read"}] * (len(later) + 1)
    assert {score.n for event in shown(scene) for score in (event.score, *event.stages.values())} == {first.score.n}
    assert {event.zero_shot for event in shown(scene)} == {first.zero_shot}
    assert result.scores("dev") == {"zero_shot": last.zero_shot, **last.stages, "tuned": last.score}
    assert len(later) == 2  # after 2 and 4 rounds; the last mean is evaluated only with its final readout


def test_with_patience_the_best_so_far_is_shown(scene: FitScene) -> None:
    scene.run(**{**EVERY_2, "rounds": 40, "patience": 3})
    history = {line.round: line.metrics for line in scene.store.history("r")}
    judged = [(round, loss) for round in history if round and (loss := judged_loss(history[round])) is not None]
    best = min(judged, key=lambda pair: pair[1])[0]
    after = [event for event in shown(scene) if event.round > best]
    [at_best] = [event for event in shown(scene) if event.round == best]
    assert len(after) > 2
    assert {event.score for event in after[:-1]} == {at_best.score}
    assert after[-1].score == at_best.score


# --- it is an observation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["pooled", "fedbpt", "fedavg"])
def test_live_evaluations_do_not_change_the_run(scene: FitScene, method: str) -> None:
    few = {**EVERY_2, "rounds": 3, "iterations": 2, "method": method}
    watched = scene.run("watched", **{**few, "evaluate_every": 1})
    rounds = [(event.round, event.purpose) for event in scene.of(RoundClosed)]
    scene.events.clear()
    alone = scene.run("alone", **{**few, "evaluate_every": 0})
    assert [(event.round, event.purpose) for event in scene.of(RoundClosed)] == rounds
    same(watched, alone)
    assert watched.tokens <= alone.tokens  # what an evaluation computed is not computed again
    assert alone.dev == {}


def fit_plans(scene: FitScene) -> list[RoundPlan]:
    """The work of fits that device a gets from now on."""
    seen: list[RoundPlan] = []
    device, work = scene.devices["a"], scene.devices["a"].run

    def spy(plan: RoundPlan, *rest: Any) -> Any:
        seen.extend([plan] if isinstance(plan.work, FitWork) and plan.work.purpose == "readout" else [])
        return work(plan, *rest)

    device.run = spy
    return seen


def test_live_exchanges_are_distinct_from_the_runs_rounds(scene: FitScene) -> None:
    plans = fit_plans(scene)
    scene.run(**EVERY_2)
    live = [plan for plan in plans if plan.run == "r.live"]
    assert len({plan.round for plan in live}) == len(live) > 2
    assert {plan.run for plan in plans} == {"r", "r.live"}
    stored = {line.round for line in scene.store.history("r")}
    assert max(stored) == max(event.round for event in scene.of(RoundClosed))
    scene.run(**{**EVERY_2, "rounds": 8})  # replaces what devices hold of the session before
    assert shown(scene)[-1].round > max(stored)


def test_without_development_rows_there_are_no_live_exchanges(tmp_path: Path) -> None:
    scene = FitScene(tmp_path / "runs.sqlite", n_dev=0)
    plans = fit_plans(scene)
    result = scene.run(**EVERY_2)
    assert (shown(scene), result.dev) == ([], {})
    assert {plan.run for plan in plans} == {"r"}
    scene.store.close()


# --- the same rows ---------------------------------------------------------------------------------------------------

NAMES = ("zero_shot", "tuned")


def history(*evaluations: dict[str, tuple[int, int, int]]) -> dict[int, dict[str, float]]:
    """Rounds 0, 10, … of devices with (rows, right zero-shot, right tuned)."""
    found = {}
    for number, counts in enumerate(evaluations):
        reports = {
            name: EvaluateReport(n=n, correct=(before, after), loss_sums=(n * 1.0, n * 0.5), seconds=0.0)
            for name, (n, before, after) in counts.items()
        }
        found[10 * number] = metrics_of(NAMES, reports, generates=False)
    return found


def test_a_curve_has_the_devices_that_were_in_every_evaluation() -> None:
    a, b, c = (10, 5, 5), (30, 20, 20), (20, 10, 10)
    found = dev_points(
        history({"a": a, "b": b}, {"a": (10, 5, 8), "b": (30, 20, 29), "c": c}, {"a": (10, 5, 9), "c": c}), False
    )
    assert [(point.n, point.figure, point.zero_shot) for point in found] == [
        (10, 0.5, 0.5),
        (10, 0.8, 0.5),
        (10, 0.9, 0.5),
    ]
    np.testing.assert_allclose([point.loss for point in found], 0.5)
    whole = dev_points(history({"a": a, "b": b}, {"a": (10, 5, 8), "b": (30, 20, 28)}), False)
    assert [(point.n, point.figure, point.zero_shot) for point in whole] == [(40, 0.625, 0.625), (40, 0.9, 0.625)]


def test_devices_with_no_common_evaluation_are_shown_separately() -> None:
    found = dev_points(history({"a": (10, 5, 5)}, {"b": (10, 6, 9)}), False)
    assert [(point.figure, point.zero_shot) for point in found] == [(0.5, 0.5), (0.9, 0.6)]


def test_evaluations_of_older_versions_are_shown_against_their_first() -> None:
    old = {
        0: {"dev_accuracy": 0.6, "dev_loss": 1.0, "dev_n": 20.0, "dev_accuracy/a": 0.6, "dev_loss/a": 1.0},
        20: {"dev_accuracy": 0.8, "dev_loss": 0.5, "dev_n": 20.0, "dev_accuracy/a": 0.8, "dev_loss/a": 0.5},
    }
    assert dev_points(old, False) == [DevPoint(0, 20, 0.6, 1.0, 0.6, 1.0), DevPoint(20, 20, 0.8, 0.5, 0.6, 1.0)]
    assert judged_loss(old[20]) == 0.5


def test_perplexities_are_of_the_mean_loss() -> None:
    counts = {"a": (10, 0, 0), "b": (10, 0, 0)}
    metrics = {0: {**history(counts)[0]}, 10: {**history({"a": counts["a"]})[0]}}
    metrics = {
        round: {name.replace("accuracy", "perplexity"): value for name, value in found.items()}
        for round, found in metrics.items()
    }
    first, _ = dev_points(metrics, True)
    assert first.figure == pytest.approx(np.exp(0.5))
    assert first.zero_shot == pytest.approx(np.exp(1.0))


def test_a_score_without_rows_is_none() -> None:
    assert dev_points({1: {"loss": 1.0}}, False) == []
    assert Score(n=0, correct=0, loss_sum=0.0).interval == (0.0, 1.0)
