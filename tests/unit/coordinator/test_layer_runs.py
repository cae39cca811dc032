"""Runs that read layers: they fit readouts to hidden states, and let held-out training rows choose what is shipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fedbpt import Prompt, evaluate
from fedbpt.api import make_prompt
from fedbpt.coordinator.federation import Federation
from fedbpt.coordinator.run_state import RunState
from fedbpt.device.device import Device
from fedbpt.device.layer_work import fitted_rows, held_rows, spread_folds
from fedbpt.errors import ConfigError
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import (
    CrossResult,
    CrossWork,
    EvaluateReport,
    EvaluateRequest,
    HeldRows,
    LocalWork,
    LogisticResult,
    LogisticWork,
    MomentsWork,
    PooledWork,
    RoundPlan,
    RoundReport,
    SumsResult,
    SumsWork,
)
from fedbpt.protocol.specs import Array, LayerReadout, ObjectiveSpec, PrivacySpec, PromptSpec, Readout, Template
from fedbpt.runs.events import DeviceLost, Event, RoundClosed, RunStarted
from fedbpt.runs.result import BASELINES, RunResult
from fedbpt.runs.settings import RunSettings
from fedbpt.tasks import Row, Task
from tests.support.raises import raises
from tests.support.toy_scene import D, Scene, StopRunError, closed, settings, stop
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {
    "rounds": 3,
    "popsize": 4,
    "prompt": PromptSpec(d=D, alpha=2.0, seed=3),
    "objective": ObjectiveSpec(batch_size=4),
    "calibrate": True,
}
TEST = {"a": rows(10, 200), "b": rows(12, 300), "c": rows(3, 400)}
LONG = Task(
    name="toy-mood",
    labels=TASK.labels,
    templates=tuple(
        Template(pattern=template.pattern, label_words=(" bad" * 20, " good" * 20)) for template in TASK.templates
    ),
)


class SpyScorer(ToyScorer):
    """Notes which rows are scored. ``heard``: of the device's current call, or None."""

    heard: set[str] | None = None

    def score_with_soft_prompt(self, tokens: Any, *rest: Any, **options: Any) -> Any:
        if self.heard is not None:
            texts = [bytes(int(token) for token in ids if token < 256).decode() for ids in tokens]
            self.heard |= {text.removeprefix("Question: ").split("\n")[0] for text in texts}
        return super().score_with_soft_prompt(tokens, *rest, **options)


class SpyDevice(Device):
    """Notes the rows of each plan and request: ``scored`` by the type of work, or the split."""

    def __init__(self, name: str, train: list[Row], dev: list[Row], test: list[Row], task: Task = TASK) -> None:
        self.spy = SpyScorer()
        super().__init__(name, self.spy, train, dev, test, task=task)
        self.scored: dict[str, set[str]] = {}
        self.plans: list[RoundPlan] = []
        self.requests: list[EvaluateRequest] = []
        self.change: Callable[[RoundReport], RoundReport] = lambda report: report

    def run(self, plan: RoundPlan, *rest: Any) -> RoundReport:
        self.plans.append(plan)
        return self.change(self._heard(type(plan.work).__name__, super().run, plan, *rest))

    def evaluate(self, request: EvaluateRequest, *rest: Any) -> EvaluateReport:
        self.requests.append(request)
        found: EvaluateReport = self._heard(request.split, super().evaluate, request, *rest)
        return found

    def _heard(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        self.spy.heard = set()
        try:
            return call(*args)
        finally:
            self.scored.setdefault(name, set()).update(self.spy.heard)
            self.spy.heard = None


class LayerScene(Scene):
    """Devices with different rows, and runs with default readouts."""

    def __init__(
        self, path: Path, train: dict[str, list[Row]] | None = None, task: Task = TASK, n_dev: int = 4
    ) -> None:
        self.task = task
        shares = train or {"a": rows(24), "b": rows(26, 50)}
        devices = [
            SpyDevice(name, share, share[:n_dev], TEST.get(name, TEST["c"]), task) for name, share in shares.items()
        ]
        super().__init__(path, *devices)

    def federation(self, run: str = "r", task: Task | None = None, control: Any = None, **changes: Any) -> Federation:
        chosen = settings(**{**SETTINGS, **changes})

        def hear(event: Event) -> None:
            self.events.append(event)
            self.on_event(event)

        clients = list(self.clients.values())
        return Federation(clients, task or self.task, chosen, chosen.aggregator(), self.store, run, hear, control)

    def purposes(self) -> list[str]:
        """Purposes of the closed rounds, without repetitions."""
        return [purpose for purpose, _ in groupby(event.purpose for event in self.of(RoundClosed))]

    def test_rows(self) -> list[Row]:
        return [row for name in self.devices for row in TEST[name]]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., LayerScene]]:
    scenes: list[LayerScene] = []

    def made(*args: Any, **options: Any) -> LayerScene:
        scenes.append(LayerScene(tmp_path / f"{len(scenes)}.sqlite", *args, **options))
        return scenes[-1]

    yield made
    for scene in scenes:
        scene.store.close()


@pytest.fixture
def scene(make: Callable[..., LayerScene]) -> LayerScene:
    return make()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunResult, LayerScene]]:
    """An undisturbed run."""
    scene = LayerScene(tmp_path_factory.mktemp("whole") / "runs.sqlite")
    result = scene.run()
    yield result, scene
    scene.store.close()


def same(one: RunResult, other: RunResult) -> None:
    """Without names and times."""
    names = ("mean", "digest", "rounds", "evaluations", "zero_shot", "tuned", "baselines", "fits", "template")
    for name in (*names, "layer_fits", "shipped"):
        assert getattr(one, name) == getattr(other, name), name


def scores_as_reported(result: RunResult, task: Task, data: list[Row], path: Path) -> None:
    prompt = make_prompt(ToyScorer(), task, result)
    loaded = Prompt.load(prompt.save(path / "p.safetensors"))
    assert loaded == prompt
    for given in (prompt, loaded):
        found = evaluate(ToyScorer(), task, data, given)
        assert (found.n, found.correct) == (result.tuned.n, result.tuned.correct)
        assert found.loss == pytest.approx(result.tuned.loss, abs=1e-4)


# --- what a run does -----------------------------------------------------------------------------------------------


def test_a_run_with_default_settings_fits_readouts_to_layers(whole: tuple[RunResult, LayerScene]) -> None:
    result, scene = whole
    assert scene.purposes() == ["selection", "calibration", "probe", "search", "readout"]
    counts = [event.purpose for event in scene.of(RoundClosed)]
    assert [counts.count(purpose) for purpose in ("probe", "search", "readout")] == [3, 3, 3]
    assert set(result.layer_fits) == {"probe", "readout"}
    assert set(result.fits) == {"calibration"}
    assert all(isinstance(readout, LayerReadout) for readout in result.layer_fits.values())
    assert codec.decode(codec.encode(result), RunResult) == result


def test_the_result_has_every_variant_on_the_same_rows_and_ships_one_of_them(
    whole: tuple[RunResult, LayerScene],
) -> None:
    result, _ = whole
    assert set(result.baselines) == set(BASELINES)
    scores = (result.zero_shot, result.tuned, *result.baselines.values())
    assert {score.n for score in scores} == {22}
    assert result.shipped
    assert result.tuned == result.baselines[result.shipped]
    latent, readout = result.variants()[result.shipped]
    assert readout == result.readout
    np.testing.assert_array_equal(latent, result.latent)


def moods(n: int, first: int) -> list[Row]:
    """``n`` rows whose label the text tells."""
    return [(f"{('bad', 'fine')[i % 2]} thing, number {i}", i % 2) for i in range(first, first + n)]


def test_readouts_of_layers_know_more_than_the_label_words(make: Callable[..., LayerScene]) -> None:
    scene = make({"a": moods(24, 0), "b": moods(24, 50)})
    for device, first in zip(scene.devices.values(), (200, 300), strict=True):
        device._rows["test"] = tuple(moods(30, first))
    result = scene.run()
    assert result.shipped in ("probe", "read")
    assert result.baselines["probe"].accuracy > 0.9
    assert result.baselines["probe"].loss < result.baselines["calibrated"].loss - 0.05


def test_every_variant_of_a_result_scores_as_it_was_measured(whole: tuple[RunResult, LayerScene]) -> None:
    result, scene = whole
    for name, (latent, readout) in result.variants().items():
        fits = {"readout": readout} if isinstance(readout, Readout) else {}
        layer_fits = {"readout": readout} if isinstance(readout, LayerReadout) else {}
        line = msgspec.structs.replace(result, mean=Array.of(latent), fits=fits, layer_fits=layer_fits, shipped="")
        found = evaluate(ToyScorer(), TASK, scene.test_rows(), make_prompt(ToyScorer(), TASK, line))
        score = {"zero_shot": result.zero_shot, "tuned": result.tuned, **result.baselines}[name]
        assert found.correct == score.correct, name
        assert found.loss == pytest.approx(score.loss, abs=1e-4), name


def test_the_prompt_of_a_run_scores_as_in_the_run(whole: tuple[RunResult, LayerScene], tmp_path: Path) -> None:
    result, scene = whole
    scores_as_reported(result, TASK, scene.test_rows(), tmp_path)


def test_what_is_shipped_had_the_lowest_loss_on_held_rows_or_is_the_probe(whole: tuple[RunResult, LayerScene]) -> None:
    result, scene = whole
    requests = {
        name: [request for request in device.requests if request.split == "held"]
        for name, device in scene.devices.items()
    }
    assert [len(found) for found in requests.values()] == [1, 1]
    names = ["probe", "calibrated", "prompt", "read"]
    losses = np.zeros(len(names))
    for name, (request,) in requests.items():
        assert request.layer_readouts[0] != result.layer_fits["probe"]  # fitted without the rows that judge
        losses += Device(name, ToyScorer(), scene.devices[name]._rows["train"], task=TASK).evaluate(request).loss_sums
    assert names[int(losses.argmin())] in (result.shipped, names[1 + int(losses[1:].argmin())])
    assert losses[names.index(result.shipped)] <= losses[0]


def test_a_live_evaluation_shows_the_probe_until_the_end(scene: LayerScene) -> None:
    result = scene.run(evaluate_every=1)
    history = [line.metrics for line in scene.store.history("r") if "dev_accuracy" in line.metrics]
    assert len(history) >= 3
    assert set(result.dev) == {"zero_shot", "tuned", *BASELINES}
    assert result.dev["tuned"] == result.dev[result.shipped]


# --- held-out rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [4, 0])
@pytest.mark.parametrize("method", ["pooled", "fedavg"])
def test_the_search_never_scores_the_rows_that_choose(
    make: Callable[..., LayerScene], method: str, batch_size: int
) -> None:
    scene = make()
    scene.run(rounds=6, method=method, objective=ObjectiveSpec(batch_size=batch_size), iterations=3)
    work = {"pooled": PooledWork, "fedavg": LocalWork}[method].__name__
    for device in scene.devices.values():
        train = {text for text, _ in device._rows["train"]}
        searched, held = device.scored[work], device.scored["held"]
        assert len(held) == len(train) // 4
        assert held <= train
        assert not searched & held
        if batch_size == 0:
            assert searched == train - held
        assert held <= device.scored["SumsWork"]


@pytest.mark.parametrize("max_rows", [0, 10, 40])
@pytest.mark.parametrize("n", [1, 3, 4, 5, 31])
def test_the_rows_that_choose_are_the_first_fold_of_a_devices_fit(n: int, max_rows: int) -> None:
    targets = np.array([label for _, label in rows(n)])
    held = held_rows(targets, HeldRows(seed=7, max_rows=max_rows))
    chosen, folds = fitted_rows(targets, max_rows, 4, 7)
    for device in "abcdef":
        spread = spread_folds(folds, 4, 7, device)
        assert chosen[spread == 0].tolist() == held.tolist()
        assert sorted(np.bincount(spread, minlength=4)[1:]) == sorted(np.bincount(folds, minlength=4)[1:])
    assert len({tuple(spread_folds(folds, 4, 7, device).tolist()) for device in "abcdef"}) > 1


def test_a_run_of_words_searches_with_all_rows(scene: LayerScene) -> None:
    scene.run(rounds=2, objective=ObjectiveSpec(batch_size=0), readout="words")
    for device in scene.devices.values():
        assert device.scored["PooledWork"] == {text for text, _ in device._rows["train"]}
        assert "held" not in device.scored


def test_a_device_with_too_few_rows_to_hold_any_takes_part_and_is_not_lost(make: Callable[..., LayerScene]) -> None:
    scene = make({"a": rows(24), "b": rows(26, 50), "c": rows(3, 90)})
    result = scene.run()
    assert scene.of(DeviceLost) == []
    assert {event.reported for event in scene.of(RoundClosed)} == {("a", "b", "c")}
    assert "held" not in scene.devices["c"].scored
    assert scene.devices["c"].scored["PooledWork"] == {text for text, _ in rows(3, 90)}
    assert result.tuned.n == 25
    assert result.shipped


@pytest.mark.parametrize("n", [1, 2, 3])
def test_devices_of_a_few_rows_each_run_to_the_end(make: Callable[..., LayerScene], n: int) -> None:
    scene = make({"a": rows(n, 1), "b": rows(n, 4)}, n_dev=1)
    result = scene.run()
    assert scene.of(DeviceLost) == []
    assert result.shipped == "probe"  # nothing is held that could choose another
    assert math.isfinite(result.tuned.loss)


def test_many_devices_of_one_row_each_learn_a_readout_together(make: Callable[..., LayerScene]) -> None:
    scene = make({f"d{i}": moods(1, i) for i in range(16)}, n_dev=0)
    for device in scene.devices.values():
        device._rows["test"] = tuple(moods(6, 300))
    result = scene.run(rounds=1)
    assert scene.of(DeviceLost) == []
    assert result.shipped == "probe"
    assert result.tuned.accuracy > 0.9
    assert result.tuned.loss < 0.1


# --- the choice ------------------------------------------------------------------------------------------------------


def state() -> RunState:
    chosen = RunSettings(rounds=1, prompt=PromptSpec(d=D))
    return RunState(TASK, chosen, chosen.aggregator())


def held_reports(*differences: np.ndarray, n_devices: int = 1) -> list[EvaluateReport]:
    """Losses of rows less those of the first line, for each further line; spread over devices."""
    lines = np.stack([np.zeros_like(differences[0]), *differences])
    return [
        EvaluateReport(
            n=part.shape[1],
            correct=(0,) * len(lines),
            loss_sums=tuple((part + 2.0).sum(axis=1).tolist()),
            seconds=0.0,
            difference_squares=tuple((part**2).sum(axis=1).tolist()),
        )
        for part in np.array_split(lines, n_devices, axis=1)
    ]


@pytest.mark.parametrize("n_devices", [1, 3])
@pytest.mark.parametrize(("errors", "chosen"), [(1.65, "probe"), (1.8, "prompt"), (-3.0, "probe")])
def test_another_line_must_be_better_with_95_percent_confidence(  # Student, 19 degrees of freedom: 1.73
    errors: float, chosen: str, n_devices: int
) -> None:
    noise = np.random.default_rng(0).standard_normal(20)
    standard_error = noise.std(ddof=1) / np.sqrt(len(noise))
    difference = noise - noise.mean() - errors * standard_error
    made = state()
    made.choose(["probe", "prompt"], held_reports(difference, n_devices=n_devices))
    assert made.shipped == chosen


def test_the_best_of_several_lines_within_their_errors_is_chosen() -> None:
    sure, unsure = np.full(16, -0.3), np.resize([-2.0, 1.2], 16)  # means −0.3 and −0.4
    made = state()
    made.choose(["probe", "calibrated", "prompt", "read"], held_reports(np.full(16, 0.1), sure, unsure))
    assert made.shipped == "prompt"


def test_equal_lines_and_few_rows_leave_the_first_line() -> None:
    for reports in ([], held_reports(np.zeros(8)), held_reports(np.array([-5.0]))):
        made = state()
        made.choose(["probe", "read"], reports)
        assert made.shipped == "probe"


# --- resuming ------------------------------------------------------------------------------------------------------


def test_a_run_stopped_at_every_round_resumes_to_the_same_result(
    whole: tuple[RunResult, LayerScene], scene: LayerScene
) -> None:
    n_rounds = len(whole[1].of(RoundClosed))
    for round in range(n_rounds):
        scene.when(closed(round), stop)
        with pytest.raises(StopRunError):
            scene.run()
        assert scene.of(RunStarted)[-1].resumed == round
    same(scene.run(), whole[0])
    assert [event.round for event in scene.of(RoundClosed)] == list(range(n_rounds))
    digests = [[stored.state_digest for stored in each.store.rounds("r")] for each in (scene, whole[1])]
    assert digests[0] == digests[1]


def test_a_larger_budget_continues_the_search_and_chooses_anew(scene: LayerScene) -> None:
    scene.run()
    before = len(scene.of(RoundClosed))
    longer = scene.run(rounds=5)
    added = [event.purpose for event in scene.of(RoundClosed)][before:]
    assert added == ["search", "search", "readout", "readout", "readout"]
    same(longer, scene.run("other", rounds=5))


# --- states alone ----------------------------------------------------------------------------------------------------


def test_a_task_of_long_label_words_only_fits_the_probe(make: Callable[..., LayerScene], tmp_path: Path) -> None:
    scene = make(task=LONG)
    result = scene.run()
    assert scene.purposes() == ["probe"]
    assert result.rounds == result.evaluations == 0
    assert set(result.layer_fits) == {"probe"}
    assert result.fits == {}
    assert result.zero_shot.n == 0
    assert "zero_shot" not in result.scores("test")
    assert result.tuned == result.baselines["probe"]
    assert result.readout == result.layer_fits["probe"]
    assert not result.readout.word_scales.numpy().any()
    assert not result.latent.any()
    scores_as_reported(result, LONG, scene.test_rows(), tmp_path)
    assert codec.decode(codec.encode(result), RunResult) == result


def test_states_alone_never_score_a_label_word(make: Callable[..., LayerScene]) -> None:
    scene = make(task=LONG)
    scorers = [device.spy for device in scene.devices.values()]
    followed: list[Any] = []
    for scorer in scorers:
        scorer.log_probabilities = lambda *given: followed.append(given)
    scene.run(evaluate_every=1)
    assert followed == []


def test_states_alone_resume_at_every_round(make: Callable[..., LayerScene]) -> None:
    undisturbed = make(task=LONG).run()
    scene = make(task=LONG)
    for number in range(1, 4):
        seen: list[Event] = []
        scene.when(lambda event, seen=seen: isinstance(event, RoundClosed) and not seen.append(event), stop)  # type: ignore[misc]
        with pytest.raises(StopRunError):
            scene.run()
        assert len(scene.of(RoundClosed)) == number
    same(scene.run(), undisturbed)


def test_one_template_of_short_label_words_is_enough_for_a_search(make: Callable[..., LayerScene]) -> None:
    mixed = msgspec.structs.replace(LONG, templates=(LONG.templates[0], TASK.templates[1]))
    scene = make(task=mixed)
    result = scene.run()
    assert scene.purposes() == ["selection", "calibration", "probe", "search", "readout"]
    assert result.zero_shot.n == 22


def test_a_task_of_more_templates_than_are_read_runs_to_the_end(make: Callable[..., LayerScene]) -> None:
    many = msgspec.structs.replace(
        TASK, templates=tuple(Template(pattern=f"{{text}}\n{i}:", label_words=("b", "g")) for i in range(8))
    )
    scene = make(task=many)
    assert scene.run().shipped
    assert scene.of(DeviceLost) == []


# --- settings that read words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"robust": "median"}, {"readout": "words"}], ids=lambda given: next(iter(given)))
def test_a_robust_run_reads_words(make: Callable[..., LayerScene], changes: dict[str, Any]) -> None:
    scene = make({"a": rows(12), "b": rows(12, 50), "c": rows(12, 90)})
    result = scene.run(**changes)
    assert result.layer_fits == {}
    assert result.shipped == ""
    assert isinstance(result.readout, Readout)
    assert {plan.held for device in scene.devices.values() for plan in device.plans} == {None}
    assert not {request.split for device in scene.devices.values() for request in device.requests} & {"held"}


PRIVATE: dict[str, Any] = {
    "privacy": PrivacySpec(clip=0.5, noise_multiplier=1.0),
    "calibrate": False,
    "objective": ObjectiveSpec(batch_size=4, readout_words=0),
}


def test_a_private_run_reads_no_layers(scene: LayerScene) -> None:
    pytest.importorskip("dp_accounting")
    result = scene.run(**PRIVATE)
    assert scene.purposes() == ["selection", "search"]
    assert result.layer_fits == {}
    assert result.shipped == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"robust": "median"},
        PRIVATE,
        {"calibrate": False},
        {"objective": ObjectiveSpec(readout_words=0)},
    ],
    ids=["robust", "private", "not calibrated", "no readout"],
)
def test_layers_cannot_be_demanded_where_they_are_not_read(changes: dict[str, Any]) -> None:
    RunSettings(rounds=1, **changes)
    with raises(ConfigError, field="readout"):
        RunSettings(rounds=1, readout="layers", **changes)


# --- logistic regression on states -----------------------------------------------------------------------------------

FIVE = {name: moods(24, 50 * number) for number, name in enumerate("abcde")}


def test_a_logistic_readout_reads_layers_by_gradients(make: Callable[..., LayerScene]) -> None:
    scene = make({"a": moods(24, 0), "b": moods(24, 50)})
    for device, first in zip(scene.devices.values(), (200, 300), strict=True):
        device._rows["test"] = tuple(moods(30, first))
    result = scene.run(readout="logistic")
    works = {type(plan.work) for device in scene.devices.values() for plan in device.plans}
    assert {MomentsWork, LogisticWork} <= works
    assert not {SumsWork, CrossWork} & works
    assert set(result.layer_fits) == {"probe", "readout"}
    assert result.baselines["probe"].accuracy > 0.9
    assert result.tuned == result.baselines[result.shipped]


def test_a_logistic_readout_resumes_at_every_round(make: Callable[..., LayerScene], tmp_path: Path) -> None:
    whole = make()
    expected = whole.run("whole", readout="logistic")
    scores_as_reported(expected, TASK, whole.test_rows(), tmp_path)
    n_rounds = len(whole.of(RoundClosed))
    assert n_rounds > 6
    scene = make()
    for round in range(n_rounds):
        scene.when(closed(round), stop)
        with pytest.raises(StopRunError):
            scene.run("stopped", readout="logistic")
    same(scene.run("stopped", readout="logistic"), expected)


def test_a_robust_run_can_read_layers_by_gradients_though_a_device_lies(make: Callable[..., LayerScene]) -> None:
    scene = make(dict(FIVE))

    def change(report: RoundReport) -> RoundReport:
        if isinstance(report.result, LogisticResult):
            turned = {
                field: Array.of(-getattr(report.result, field).numpy(), getattr(report.result, field).dtype)
                for field in ("by_weights", "by_word_scales", "by_bias")
            }
            return msgspec.structs.replace(report, result=msgspec.structs.replace(report.result, **turned))
        return report

    scene.devices["e"].change = change
    for number, device in enumerate(scene.devices.values()):
        device._rows["test"] = tuple(moods(20, 600 + 40 * number))
    result = scene.run(readout="logistic", robust="median")
    assert set(result.layer_fits) == {"probe", "readout"}
    assert result.baselines["probe"].accuracy > 0.9
    assert result.shipped == ""  # the choice would trust sums of losses
    assert {plan.held for device in scene.devices.values() for plan in device.plans} == {None}


def test_long_label_words_of_a_robust_run_are_read_by_gradients(make: Callable[..., LayerScene]) -> None:
    scene = make(dict(FIVE), task=LONG)
    for number, device in enumerate(scene.devices.values()):
        device._rows["test"] = tuple(moods(20, 600 + 40 * number))
    result = scene.run(readout="logistic", robust="median")
    assert result.shipped == "probe"
    assert result.readout == result.layer_fits["probe"]
    assert result.tuned.accuracy > 0.9


def test_a_device_that_leaves_a_logistic_fit_does_not_stall_it(make: Callable[..., LayerScene]) -> None:
    scene = make({"a": moods(24, 0), "b": moods(24, 50), "c": rows(20, 90)})
    for device in scene.devices.values():
        device._rows["test"] = tuple(moods(30, 400))
    seen = 0

    def change(report: RoundReport) -> RoundReport:
        nonlocal seen
        seen += isinstance(report.result, LogisticResult)
        return msgspec.structs.replace(report, n_texts=10**6) if seen > 3 else report  # refused: it is left out

    scene.devices["c"].change = change
    result = scene.run(readout="logistic")
    assert result.baselines["probe"].accuracy > 0.9


def test_runs_begun_with_other_defaults_are_continued_with_them() -> None:
    labels = tuple(map(str, range(30)))
    now = RunSettings(rounds=1).for_labels(labels)
    before = RunSettings(rounds=1)
    assert now.continuing(before).fit_rows == before.fit_rows
    assert now.continuing(now).fit_rows == now.fit_rows
    chosen = RunSettings(rounds=1, fit_rows=100).for_labels(labels)
    assert chosen.continuing(before).fit_rows == 100


@pytest.mark.parametrize("changes", [PRIVATE, {"calibrate": False}, {"objective": ObjectiveSpec(readout_words=0)}])
def test_a_logistic_readout_cannot_be_demanded_where_it_is_not_fitted(changes: dict[str, Any]) -> None:
    with raises(ConfigError, field="readout"):
        RunSettings(rounds=1, readout="logistic", **changes)


def test_a_run_of_another_readout_is_another_run() -> None:
    digests = {RunSettings(rounds=1, readout=readout).identity() for readout in ("auto", "logistic", "words")}
    assert len(digests) == 3
    assert RunSettings(rounds=1, readout="layers").identity() == RunSettings(rounds=1).identity()


# --- reports that lie ------------------------------------------------------------------------------------------------


LIES: dict[str, Callable[[Any], Any]] = {
    "huge centres": lambda r: msgspec.structs.replace(r, centres=Array.of(np.full(r.centres.shape, 1e6), "<f4")),
    "negative rests": lambda r: msgspec.structs.replace(
        r, rests=Array.of(np.full((r.centres.shape[0], 4, r.centres.shape[1]), -1.0), "<f4")
    ),
    "no size": lambda r: msgspec.structs.replace(r, centres=Array.of(np.zeros(()), "<f4")),
    "more labels": lambda r: msgspec.structs.replace(r, counts=tuple((*fold, 0) for fold in r.counts)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_device_that_lies_about_its_sums_is_left_out(make: Callable[..., LayerScene], lie: str) -> None:
    scene = make({"a": rows(24), "b": rows(26, 50), "c": rows(8, 90)})

    def change(report: RoundReport) -> RoundReport:
        if isinstance(report.result, SumsResult):
            return msgspec.structs.replace(report, result=LIES[lie](report.result))
        return report

    scene.devices["b"].change = change
    result = scene.run()
    first = next(event for event in scene.of(RoundClosed) if event.purpose == "probe")
    assert first.reported == ("a", "c")
    assert all(np.isfinite(readout.weights.numpy()).all() for readout in result.layer_fits.values())


def test_a_device_that_lies_about_its_losses_is_left_out(make: Callable[..., LayerScene]) -> None:
    scene = make({"a": rows(24), "b": rows(26, 50), "c": rows(8, 90)})

    def change(report: RoundReport) -> RoundReport:
        if isinstance(report.result, CrossResult):
            sums = np.full(report.result.loss_sums.shape, 1e30)
            return msgspec.structs.replace(
                report, result=msgspec.structs.replace(report.result, loss_sums=Array.of(sums, "<f4"))
            )
        return report

    scene.devices["c"].change = change
    scene.run()
    assert [event.reported for event in scene.of(RoundClosed) if event.purpose == "probe"][1] == ("a", "b")
