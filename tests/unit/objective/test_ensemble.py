"""Runs whose readout averages over all of the task's templates, with the toy model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fedbpt import Budget, Prompt, evaluate, tune
from fedbpt.aggregation.readout import EXCHANGES
from fedbpt.api import make_prompt
from fedbpt.errors import ConfigError
from fedbpt.objective.losses import cross_entropy
from fedbpt.objective.objective import Objective
from fedbpt.objective.readout import blocks, read
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import FitResult, FitWork, RoundReport
from fedbpt.protocol.specs import Array, ObjectiveSpec, PromptSpec, Readout, Template
from fedbpt.runs.events import RoundClosed, RunStarted, TemplateSelected
from fedbpt.runs.result import RunResult, Score
from fedbpt.tasks import Row, Task
from tests.support.toy_scene import D, Scene, StopRunError, stop
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK as TWO
from tests.support.toy_task import rows
from tests.unit.coordinator.test_federation_fit import SETTINGS, TEST, FitScene, nth

# the second one is selected
FIRST = Template(pattern="Text: {text}\nSo (", label_words=("n", "y"))
THREE = Task(name=TWO.name, labels=TWO.labels, templates=(FIRST, *TWO.templates))
N_WORDS = 13
PER_TEMPLATE = 4
SPEC = ObjectiveSpec(batch_size=4, readout_words=N_WORDS)


class EnsembleScene(FitScene):
    """Two devices, and runs of a task with three templates."""

    def run(self, run: str = "r", task: Task = THREE, **changes: Any) -> RunResult:  # type: ignore[override]
        return Scene.run(self, run, task, **{**SETTINGS, "ensemble": 9, "objective": SPEC, **changes})


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[EnsembleScene]:
    scene = EnsembleScene(tmp_path / "runs.sqlite")
    yield scene
    scene.store.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunResult, EnsembleScene]]:
    """An uninterrupted run."""
    scene = EnsembleScene(tmp_path_factory.mktemp("whole") / "runs.sqlite")
    result = scene.run()
    yield result, scene
    scene.store.close()


def same(one: RunResult, other: RunResult, *but: str) -> None:
    """Compare except names, times and ``but``; sums of losses up to the order of summation."""
    names = {"mean", "digest", "rounds", "evaluations", "zero_shot", "tuned", "baselines", "fits", "template", "others"}
    for name in names - set(but):
        assert summed(getattr(one, name)) == summed(getattr(other, name)), name


def summed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: summed(each) for name, each in value.items()}
    return (value.n, value.correct, round(value.loss_sum, 9)) if isinstance(value, Score) else value


def spied(device: Any) -> tuple[list[FitWork], list[Any]]:
    """Record the fits and evaluations that ``device`` is requested to do."""
    works, requests, run, measure = [], [], device.run, device.evaluate

    def on_run(plan: Any, *rest: Any) -> Any:
        works.extend([plan.work] if isinstance(plan.work, FitWork) else [])
        return run(plan, *rest)

    def on_evaluate(request: Any, *rest: Any) -> Any:
        requests.append(request)
        return measure(request, *rest)

    device.run, device.evaluate = on_run, on_evaluate
    return works, requests


# --- what a run does -----------------------------------------------------------------------------------------------


def test_a_result_names_the_unselected_templates_with_a_readout_for_each(
    whole: tuple[RunResult, EnsembleScene],
) -> None:
    result, scene = whole
    assert result.template == THREE.templates[1]
    assert result.others == (THREE.templates[0], THREE.templates[2])
    assert result.readout is not None
    assert [v.shape for v in (result.readout.weights, *result.readout.others)] == [(1 + PER_TEMPLATE, 2)] * 3
    assert len({v.data for v in (result.readout.weights, *result.readout.others)}) == 3
    assert codec.decode(codec.encode(result), RunResult) == result
    assert scene.purposes() == ["selection", "calibration", "probe", "search", "readout"]
    assert len([e for e in scene.of(RoundClosed) if e.purpose == "readout"]) <= EXCHANGES + 1


@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_the_requested_number_of_templates_is_used_the_best_by_the_selection(scene: EnsembleScene, n: int) -> None:
    result = scene.run(ensemble=n)
    [selected] = scene.of(TemplateSelected)
    best = [THREE.templates[i] for i in np.argsort(selected.losses)]
    assert [result.template, *result.others] == best[:n]
    assert result.readout is not None
    assert result.readout.weights.shape == (1 + N_WORDS // min(n, 3), 2)


def test_only_the_readout_is_of_several_templates_and_they_share_its_words(scene: EnsembleScene) -> None:
    works, requests = spied(scene.devices["a"])
    result = scene.run(evaluate_every=2)
    asked = {work.purpose: (work.n_words, work.others) for work in works}
    assert asked == {"calibration": (0, ()), "probe": (N_WORDS, ()), "readout": (PER_TEMPLATE, result.others)}
    zero_shot, *live, final = requests
    assert zero_shot.others == ()
    assert {request.others for request in (*live, final)} == {result.others}
    with_others = [bool(readout and readout.others) for readout in final.readouts]
    assert with_others == [name == "tuned" for name in result.variants()]


def test_the_ensemble_changes_only_the_tuned_variant(
    whole: tuple[RunResult, EnsembleScene], scene: EnsembleScene
) -> None:
    single = scene.run(ensemble=1)
    same(single, whole[0], "tuned", "fits", "others")
    assert single.others == ()
    for purpose in ("calibration", "probe"):
        assert single.fits[purpose] == whole[0].fits[purpose]
    assert single.readout is not None
    assert single.readout.others == ()
    assert single.readout.weights.shape == (1 + N_WORDS, 2)
    assert single.tuned != whole[0].tuned


def test_the_readouts_exchanges_lower_the_mean_loss_of_the_templates(whole: tuple[RunResult, EnsembleScene]) -> None:
    losses = [event.loss for event in whole[1].of(RoundClosed) if event.purpose == "readout"]
    assert min(losses[2:]) < losses[1] - 0.02  # the first are moments


def each_and_average(prompt: Prompt, held_out: list[Row]) -> tuple[list[float], float]:
    """The losses of the templates of ``prompt`` by their own readouts, and the loss of their average."""
    scorer, spec = ToyScorer(), ObjectiveSpec(readout_words=0)
    place = msgspec.structs.replace(prompt.spec, d=1)
    losses = []
    for template, v in zip(
        (prompt.template, *prompt.others), blocks(prompt.readout, len(prompt.word_ids), 2), strict=True
    ):
        objective = Objective(scorer, template, prompt.labels, held_out, spec, place, words=prompt.word_ids)
        embeds = prompt.rows[None] if template == prompt.template else objective.zero_shot_embeds()
        logits = read(objective.logits(embeds, np.arange(len(held_out))), v)
        losses.append(float(cross_entropy(logits, objective.targets).mean()))
    return losses, evaluate(scorer, THREE, held_out, prompt).loss


@pytest.mark.parametrize("seed", [3, 4])
def test_on_unseen_rows_the_average_beats_zero_shot_and_its_templates_mean(scene: EnsembleScene, seed: int) -> None:
    result = scene.run(seed=seed, baselines=False)
    held_out = rows(60, 1000)
    each, average = each_and_average(make_prompt(ToyScorer(), THREE, result), held_out)
    assert len(set(each)) == 3
    assert average < np.mean(each)
    assert average < evaluate(ToyScorer(), THREE, held_out, template=result.template).loss - 0.02


def test_it_costs_little_if_other_templates_add_nothing(
    whole: tuple[RunResult, EnsembleScene], scene: EnsembleScene
) -> None:
    single = scene.run(ensemble=1)
    assert whole[0].tuned.loss < single.tuned.loss + 0.05
    assert max(whole[0].tuned.loss, single.tuned.loss) < single.zero_shot.loss


# --- without others ------------------------------------------------------------------------------------------------


def test_a_task_with_one_template_has_no_others_and_is_fitted_as_without_an_ensemble(scene: EnsembleScene) -> None:
    one = Task(name=TWO.name, labels=TWO.labels, templates=TWO.templates[:1])
    result, single = (scene.run(name, one, ensemble=9 if name == "on" else 1) for name in ("on", "off"))
    assert result.others == ()
    assert result.readout is not None
    assert (result.readout.others, result.readout.weights.shape) == ((), (1 + N_WORDS, 2))
    same(result, single)
    assert make_prompt(ToyScorer(), one, result).others == ()


def test_a_task_of_target_texts_has_no_others(scene: EnsembleScene) -> None:
    templates = tuple(Template(pattern=pattern, label_words=()) for pattern in ("{text}\nSo: (", "{text}\nMood: ("))
    task = Task(name="toy-text", templates=templates, label_column="answer")
    for device in scene.devices.values():
        device._rows = {split: [(text, f"zig {n}") for text, n in held] for split, held in device._rows.items()}
        device._task = task
    result = scene.run(task=task)
    assert (result.others, result.fits, result.readout) == ((), {}, None)
    prompt = make_prompt(ToyScorer(), task, result)
    assert (prompt.others, prompt.other_weights.shape) == ((), (0, 1, 0))
    assert result.tuned.n == 22
    assert np.isfinite(result.tuned.loss)


def test_a_run_without_a_readout_has_no_others(scene: EnsembleScene) -> None:
    result = scene.run(objective=ObjectiveSpec(batch_size=4, readout_words=0))
    assert result.others == ()
    assert make_prompt(ToyScorer(), THREE, result).others == ()


def test_fewer_words_than_templates_fit_a_bias_for_each(scene: EnsembleScene, tmp_path: Path) -> None:
    result = scene.run(objective=ObjectiveSpec(batch_size=4, readout_words=2), baselines=False)
    assert result.readout is not None
    assert [v.shape for v in (result.readout.weights, *result.readout.others)] == [(1, 2)] * 3
    prompt = make_prompt(ToyScorer(), THREE, result)
    assert_scores_as_the_run(Prompt.load(prompt.save(tmp_path / "p.safetensors")), result)


# --- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_run_stopped_in_the_middle_of_its_readout_resumes_to_the_same_result(
    whole: tuple[RunResult, EnsembleScene], scene: EnsembleScene, tmp_path: Path, number: int, restarted: bool
) -> None:
    scene.when(nth("readout", number), stop)
    with pytest.raises(StopRunError):
        scene.run()
    stopped = scene.of(RoundClosed)[-1].round
    if restarted:
        scene.store.close()
        scene = EnsembleScene(tmp_path / "runs.sqlite")
    same(scene.run(), whole[0])
    assert scene.of(RunStarted)[-1].resumed == stopped + 1
    digests = [[stored.state_digest for stored in of.store.rounds("r")] for of in (scene, whole[1])]
    scene.store.close()
    assert digests[0] == digests[1]


def test_a_larger_budget_continues_and_fits_all_templates_again(scene: EnsembleScene) -> None:
    live = {"evaluate_every": 2, "baselines": False}
    first = scene.run(rounds=2, **live)
    longer, at_once = scene.run(rounds=4, **live), scene.run("other", rounds=4, **live)
    same(longer, at_once)
    assert longer.readout != first.readout
    figures = [
        {line.round: line.metrics["dev_loss"] for line in scene.store.history(run) if "dev_loss" in line.metrics}
        for run in ("r", "other")
    ]
    assert list(figures[0].values()) == list(figures[1].values())


def test_a_run_is_not_resumed_with_the_other_ensemble_setting(scene: EnsembleScene) -> None:
    scene.when(nth("search", 1), stop)
    with pytest.raises(StopRunError):
        scene.run()
    with pytest.raises(ConfigError):
        scene.run(ensemble=1)


def test_a_device_with_a_result_for_one_template_is_left_out_of_the_readout(scene: EnsembleScene) -> None:
    device, run = scene.devices["b"], scene.devices["b"].run

    def lazy(plan: Any, *rest: Any) -> RoundReport:
        report = run(plan, *rest)
        if isinstance(report.result, FitResult) and report.result.purpose == "readout":
            one = msgspec.structs.replace(report.result, means=Array.of(report.result.means.numpy()[:1], "<f4"))
            return msgspec.structs.replace(report, result=one)
        return report

    device.run = lazy
    result = scene.run()
    reported = {event.purpose: event.reported for event in scene.of(RoundClosed)}
    assert (reported["search"], reported["readout"]) == (("a", "b"), ("a",))
    assert len(result.others) == 2


# --- the prompt ----------------------------------------------------------------------------------------------------


def assert_scores_as_the_run(prompt: Prompt, result: RunResult, task: Task = THREE) -> None:
    """On each device's rows, bit for bit."""
    for device in result.devices:
        found = evaluate(ToyScorer(), task, TEST[device.name], prompt)
        assert (found.n, found.correct, found.loss) == (device.tuned.n, device.tuned.correct, device.tuned.loss)


@pytest.mark.parametrize("placement", ["cue", "front"])
def test_the_prompt_of_a_run_scores_exactly_as_reported(scene: EnsembleScene, tmp_path: Path, placement: Any) -> None:
    result = scene.run(prompt=PromptSpec(d=D, alpha=2.0, seed=3, placement=placement))
    prompt = make_prompt(ToyScorer(), THREE, result)
    assert prompt.others == result.others
    assert prompt.other_weights.shape == (2, 1 + PER_TEMPLATE, 2)  # no words that the readout does not use
    assert result.readout is not None
    for v, fitted in zip(prompt.other_weights, result.readout.others, strict=True):
        np.testing.assert_array_equal(v, fitted.numpy())
    loaded = Prompt.load(prompt.save(tmp_path / "p.safetensors"))
    assert loaded == prompt
    assert_scores_as_the_run(prompt, result)
    assert_scores_as_the_run(loaded, result)


def test_the_prompt_of_a_balanced_run_scores_as_reported(scene: EnsembleScene) -> None:
    result = scene.run(balanced=True, baselines=False)
    assert len(result.others) == 2
    assert_scores_as_the_run(make_prompt(ToyScorer(), THREE, result), result)


def test_leaving_out_a_template_or_its_readout_changes_what_a_prompt_predicts(
    whole: tuple[RunResult, EnsembleScene],
) -> None:
    result, held_out = whole[0], [*TEST["a"], *TEST["b"]]
    assert result.readout is not None
    fits = {**result.fits, "readout": Readout(weights=result.readout.weights, others=result.readout.others[:1])}
    fewer = msgspec.structs.replace(result, others=result.others[:1], fits=fits)
    swapped = msgspec.structs.replace(result, others=result.others[::-1])
    losses = {
        evaluate(ToyScorer(), THREE, held_out, make_prompt(ToyScorer(), THREE, one)).loss
        for one in (result, fewer, swapped)
    }
    assert len(losses) == 3


def test_tune_on_one_machine_averages_the_tasks_templates_too() -> None:
    spec = PromptSpec(d=D, alpha=2.0)
    tuned = tune(ToyScorer(), TWO, rows(24), budget=Budget(evaluations=16), prompt=spec, popsize=8, readout="words")
    assert tuned.prompt.others == tuple(template for template in TWO.templates if template != tuned.template)
    assert tuned.prompt.readout.others
    held_out = rows(30, 500)
    assert (
        evaluate(ToyScorer(), TWO, held_out, tuned.prompt).loss
        < evaluate(ToyScorer(), TWO, held_out, template=tuned.template).loss
    )
