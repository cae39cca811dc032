"""Runs that calibrate, fit a baseline and fit a readout of words, over devices with the toy model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fedbpt import Prompt, evaluate
from fedbpt.aggregation.readout import EXCHANGES
from fedbpt.api import make_prompt
from fedbpt.device.device import Device
from fedbpt.errors import ConfigError, StoreError
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import FitResult, FitWork, RoundReport
from fedbpt.protocol.specs import Array, ObjectiveSpec, PromptSpec, Readout
from fedbpt.runs.events import Event, RoundClosed, RunStarted
from fedbpt.runs.result import BASELINES, RunResult
from fedbpt.tasks import Row
from tests.support.raises import raises
from tests.support.toy_scene import D, Scene, StopRunError, closed, stop
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows

pytestmark = pytest.mark.slow

N_WORDS = 6
SETTINGS: dict[str, Any] = {
    "rounds": 3,
    "popsize": 4,
    "prompt": PromptSpec(d=D, alpha=2.0, seed=3),
    "objective": ObjectiveSpec(batch_size=4, readout_words=N_WORDS),
    "calibrate": True,
    "baselines": True,
    "ensemble": 1,
    "readout": "words",
}
TEST = {"a": rows(10, 200), "b": rows(12, 300)}


class FitScene(Scene):
    """Two devices with different rows, and runs with all fits."""

    def __init__(self, path: Path, train: dict[str, list[Row]] | None = None, n_dev: int = 4) -> None:
        shares = train or {"a": rows(12), "b": rows(14, 50)}
        super().__init__(
            path,
            *(Device(name, ToyScorer(), share, share[:n_dev], TEST[name], task=TASK) for name, share in shares.items()),
        )

    def run(self, run: str = "r", **changes: Any) -> RunResult:
        return super().run(run, TASK, **{**SETTINGS, **changes})

    def purposes(self) -> list[str]:
        """Purposes of the closed rounds, without repetitions."""
        return [purpose for purpose, _ in groupby(event.purpose for event in self.of(RoundClosed))]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[FitScene]:
    scene = FitScene(tmp_path / "runs.sqlite")
    yield scene
    scene.store.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunResult, FitScene]]:
    """An undisturbed run."""
    scene = FitScene(tmp_path_factory.mktemp("whole") / "runs.sqlite")
    result = scene.run()
    yield result, scene
    scene.store.close()


def same(one: RunResult, other: RunResult) -> None:
    """Without names and times."""
    for name in ("mean", "digest", "rounds", "evaluations", "zero_shot", "tuned", "baselines", "fits", "template"):
        assert getattr(one, name) == getattr(other, name), name


# --- what a run does -----------------------------------------------------------------------------------------------


def test_a_run_selects_calibrates_fits_its_baseline_searches_and_fits_its_readout(
    whole: tuple[RunResult, FitScene],
) -> None:
    result, scene = whole
    assert scene.purposes() == ["selection", "calibration", "probe", "search", "readout"]
    events = scene.of(RoundClosed)
    assert [event.round for event in events] == list(range(len(events)))
    counts = {purpose: len([e for e in events if e.purpose == purpose]) for purpose in scene.purposes()}
    assert counts["search"] == 3
    assert counts["calibration"] <= EXCHANGES
    assert max(counts["probe"], counts["readout"]) <= EXCHANGES + 1
    assert result.rounds == counts["search"]
    assert result.evaluations == 3 * 4
    assert [event.searched for event in events if event.purpose == "search"] == [1, 2, 3]
    assert {event.searched for event in events if event.purpose == "readout"} == {3}


def test_the_result_has_every_baseline_on_the_same_rows(whole: tuple[RunResult, FitScene]) -> None:
    result, _ = whole
    assert set(result.baselines) == set(BASELINES) - {"read"} == {"calibrated", "probe", "prompt"}
    assert {score.n for score in (result.zero_shot, result.tuned, *result.baselines.values())} == {22}
    assert result.readout is not None
    assert result.readout.weights.shape == (1 + N_WORDS, 2)
    losses = {score.loss_sum for score in (result.zero_shot, result.tuned, *result.baselines.values())}
    assert len(losses) == 5
    assert codec.decode(codec.encode(result), RunResult) == result


def test_the_variants_of_a_result_are_those_it_measured(whole: tuple[RunResult, FitScene], scene: FitScene) -> None:
    result, _ = whole
    same(scene.federation("r", TASK, **SETTINGS).run(), result)
    lines = result.variants()
    assert set(lines) == {"zero_shot", "tuned", *BASELINES} - {"read"}
    for name, (latent, readout) in lines.items():
        assert latent.any() == (name in ("tuned", "prompt"))
        bias_alone = readout is not None and readout.weights.shape == (1, 2)
        assert bias_alone == (name in ("calibrated", "prompt")), name
        fits = {} if readout is None else {"readout": readout}
        changed = msgspec.structs.replace(result, mean=Array.of(latent), fits=fits)
        prompt = make_prompt(ToyScorer(), TASK, changed)
        found = evaluate(ToyScorer(), TASK, [*TEST["a"], *TEST["b"]], prompt)
        score = {"zero_shot": result.zero_shot, "tuned": result.tuned, **result.baselines}[name]
        assert found.correct == score.correct, name
        assert found.loss == pytest.approx(score.loss, abs=1e-5), name


def test_fits_lower_the_loss_of_the_rows_that_they_see(whole: tuple[RunResult, FitScene]) -> None:
    _, scene = whole
    for purpose in ("calibration", "probe", "readout"):
        losses = [event.loss for event in scene.of(RoundClosed) if event.purpose == purpose]
        gradients = losses if purpose == "calibration" else losses[1:]
        assert min(gradients[1:]) < gradients[0]


@pytest.mark.parametrize(
    ("changes", "purposes", "baselines"),
    [
        ({"baselines": False}, ["selection", "calibration", "search", "readout"], {"calibrated", "prompt"}),
        ({"calibrate": False}, ["selection", "probe", "search", "readout"], {"probe", "prompt"}),
        (
            {"objective": ObjectiveSpec(batch_size=4, readout_words=0)},
            ["selection", "calibration", "search"],
            {"calibrated"},
        ),
        (
            {"objective": ObjectiveSpec(batch_size=4, readout_words=0), "calibrate": False, "baselines": False},
            ["selection", "search"],
            set(),
        ),
    ],
    ids=["no baselines", "no calibration", "no readout", "a search alone"],
)
def test_stages_that_are_switched_off_are_left_out(
    scene: FitScene, changes: dict[str, Any], purposes: list[str], baselines: set[str]
) -> None:
    result = scene.run(**changes)
    assert scene.purposes() == purposes
    assert set(result.baselines) == baselines
    rows_of_readout = {"readout": 1 + N_WORDS, "calibration": 1}
    last = next((purpose for purpose in ("readout", "calibration") if purpose in purposes), None)
    assert (result.readout is None) == (last is None)
    if result.readout is not None:
        assert result.readout.weights.shape[0] == rows_of_readout[last]


def test_live_evaluations_count_rounds_of_the_search(scene: FitScene) -> None:
    result = scene.run(evaluate_every=2, rounds=4)
    before = next(event.round for event in scene.of(RoundClosed) if event.purpose == "search") - 1
    history = scene.store.history("r")
    # the last mean is evaluated once, with the readout that is shipped
    assert [line.round for line in history if "dev_accuracy" in line.metrics] == [0, before + 2, history[-1].round]
    assert result.rounds == 4


# --- resuming ------------------------------------------------------------------------------------------------------


def nth(purpose: str, number: int) -> Callable[[Event], bool]:
    """The ``number``-th closed round of ``purpose``."""
    seen: list[Event] = []

    def wanted(event: Event) -> bool:
        if isinstance(event, RoundClosed) and event.purpose == purpose:
            seen.append(event)
            return len(seen) == number
        return False

    return wanted


@pytest.mark.parametrize(
    ("purpose", "number"),
    [("calibration", 1), ("calibration", 2), ("probe", 1), ("probe", 3), ("search", 3), ("readout", 1), ("readout", 3)],
)
def test_a_run_stopped_in_the_middle_of_a_fit_resumes_to_the_same_result(
    whole: tuple[RunResult, FitScene], scene: FitScene, purpose: str, number: int
) -> None:
    scene.when(nth(purpose, number), stop)
    with pytest.raises(StopRunError):
        scene.run()
    stopped = scene.of(RoundClosed)[-1].round
    same(scene.run(), whole[0])
    assert scene.of(RunStarted)[-1].resumed == stopped + 1
    assert [event.round for event in scene.of(RoundClosed)] == list(range(len(whole[1].of(RoundClosed))))


def test_a_run_stopped_at_every_round_resumes_to_the_same_result(
    whole: tuple[RunResult, FitScene], scene: FitScene
) -> None:
    for round in range(whole[0].rounds + 1):
        scene.when(closed(round), stop)
        with pytest.raises(StopRunError):
            scene.run()
    same(scene.run(), whole[0])


def test_a_stopped_run_resumes_on_restarted_devices(
    whole: tuple[RunResult, FitScene], scene: FitScene, tmp_path: Path
) -> None:
    scene.when(nth("readout", 2), stop)
    with pytest.raises(StopRunError):
        scene.run()
    scene.store.close()
    again = FitScene(tmp_path / "runs.sqlite")
    same(again.run(), whole[0])
    again.store.close()


def test_a_larger_budget_continues_the_search_and_refits_the_readout(scene: FitScene) -> None:
    first = scene.run()
    assert scene.run() == first
    before = len(scene.of(RoundClosed))
    longer = scene.run(rounds=5)
    added = [event.purpose for event in scene.of(RoundClosed)][before:]
    assert added[:2] == ["search", "search"]
    assert set(added[2:]) == {"readout"}
    assert longer.readout != first.readout
    at_once = scene.run("other", rounds=5)
    for name in ("mean", "digest", "readout", "tuned", "zero_shot", "baselines", "evaluations"):
        assert getattr(longer, name) == getattr(at_once, name), name


def test_a_larger_budget_is_resumed_in_its_second_readout_too(scene: FitScene) -> None:
    scene.run()
    undisturbed = scene.run("other", rounds=5)
    scene.events.clear()
    scene.when(nth("readout", 2), stop)
    with pytest.raises(StopRunError):
        scene.run(rounds=5)
    resumed = scene.run(rounds=5)
    assert (resumed.readout, resumed.digest, resumed.tuned) == (
        undisturbed.readout, undisturbed.digest, undisturbed.tuned,
    )  # fmt: skip


def test_more_test_rows_only_evaluate_again(scene: FitScene) -> None:
    first = scene.run(test_rows=5)
    before = len(scene.of(RoundClosed))
    more = scene.run()
    assert (first.tuned.n, more.tuned.n) == (10, 22)
    assert len(scene.of(RoundClosed)) == before
    assert more.readout == first.readout


@pytest.mark.parametrize(
    "changes",
    [{"calibrate": False}, {"baselines": False}, {"fit_rows": 5}, {"objective": ObjectiveSpec(readout_words=7)}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_run_with_other_fits_is_not_resumed(scene: FitScene, changes: dict[str, Any]) -> None:
    scene.when(closed(1), stop)
    with pytest.raises(StopRunError):
        scene.run()
    with raises(ConfigError, field="run"):
        scene.run(**changes)


def test_a_fit_that_does_not_replay_is_refused(scene: FitScene) -> None:
    scene.when(nth("readout", 3), stop)
    with pytest.raises(StopRunError):
        scene.run()
    last = scene.of(RoundClosed)[-1].round
    with scene.store._transaction() as db:
        db.execute("UPDATE rounds SET state_digest = 'x' WHERE round = ?", (last,))
    with raises(StoreError, field="round") as caught:
        scene.run()
    assert f"round {last} " in str(caught.value)


# --- the prompt ----------------------------------------------------------------------------------------------------


def test_the_prompt_of_a_run_scores_as_in_the_run(whole: tuple[RunResult, FitScene], tmp_path: Path) -> None:
    result, _ = whole
    prompt = make_prompt(ToyScorer(), TASK, result)
    assert prompt.word_weights.shape == (N_WORDS, 2)
    loaded = Prompt.load(prompt.save(tmp_path / "p.safetensors"))
    assert loaded == prompt
    for given in (prompt, loaded):
        found = evaluate(ToyScorer(), TASK, [*TEST["a"], *TEST["b"]], given)
        assert (found.n, found.correct) == (result.tuned.n, result.tuned.correct)
        assert found.loss == pytest.approx(result.tuned.loss, abs=1e-5)
    zero = evaluate(ToyScorer(), TASK, [*TEST["a"], *TEST["b"]], template=result.template)
    assert zero.correct == result.zero_shot.correct


def test_the_prompt_of_a_run_without_a_readout_has_the_calibrated_bias(scene: FitScene) -> None:
    result = scene.run(objective=ObjectiveSpec(batch_size=4, readout_words=0))
    prompt = make_prompt(ToyScorer(), TASK, result)
    assert result.readout is not None
    np.testing.assert_allclose(prompt.label_bias, result.readout.weights.numpy()[0])
    assert prompt.label_bias.any()
    assert len(prompt.word_ids) == 0
    assert evaluate(ToyScorer(), TASK, [*TEST["a"], *TEST["b"]], prompt).correct == result.tuned.correct


# --- skewed devices ------------------------------------------------------------------------------------------------


def test_the_readout_does_not_depend_on_which_device_holds_which_rows(tmp_path: Path) -> None:
    everything = rows(32)
    by_label = {"a": [row for row in everything if row[1] == 0], "b": [row for row in everything if row[1] == 1]}
    alternating = {"a": everything[::2], "b": everything[1::2]}
    found = []
    for name, train in (("skewed", by_label), ("even", alternating)):
        scene = FitScene(tmp_path / name, train)
        # All rows in every step: the search sees the same losses, whichever device holds them.
        found.append(scene.run(objective=ObjectiveSpec(batch_size=0, readout_words=N_WORDS), select_rows=0))
        scene.store.close()
    skewed, even = found
    assert skewed.template == even.template
    np.testing.assert_allclose(skewed.latent, even.latent, atol=1e-6)
    prompts = [make_prompt(ToyScorer(), TASK, result) for result in found]
    losses = [evaluate(ToyScorer(), TASK, everything, prompt).loss for prompt in prompts]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    probes = [result.baselines["probe"].loss for result in found]
    assert probes[0] == pytest.approx(probes[1], abs=0.02)
    assert losses[0] < evaluate(ToyScorer(), TASK, everything, template=skewed.template).loss - 0.05


# --- reports that lie ----------------------------------------------------------------------------------------------


def test_a_device_that_lies_in_a_fit_is_left_out_of_it(scene: FitScene) -> None:
    device, run = scene.devices["b"], scene.devices["b"].run

    def lying(plan: Any, *rest: Any) -> RoundReport:
        report = run(plan, *rest)
        if isinstance(plan.work, FitWork) and plan.work.purpose == "readout":
            huge = FitResult(purpose="readout", loss=1.0, means=Array.of(np.full(report.result.means.shape, 1e12)))
            return msgspec.structs.replace(report, result=huge)
        return report

    device.run = lying
    result = scene.run()
    reported = {event.purpose: event.reported for event in scene.of(RoundClosed)}
    assert reported["search"] == reported["probe"] == ("a", "b")
    assert reported["readout"] == ("a",)
    assert result.readout is not None
    assert np.abs(result.readout.weights.numpy()).max() < 1e3


def test_readouts_cross_the_wire_to_the_evaluation(scene: FitScene) -> None:
    asked = []
    device, evaluate_rows = scene.devices["a"], scene.devices["a"].evaluate

    def spy(request: Any, *rest: Any) -> Any:
        asked.append(request)
        return evaluate_rows(request, *rest)

    device.evaluate = spy
    result = scene.run()
    (request,) = asked
    assert len(request.readouts) == len(request.latents.numpy()) == 5
    assert request.readouts[:2] == (None, result.readout)
    assert all(isinstance(readout, Readout) for readout in request.readouts[1:])
