"""Runs with the default readout, of hidden states, over devices with the toy model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fedbpt import cli, evaluate
from fedbpt.api import make_prompt
from fedbpt.coordinator.ledger import RunLedger
from fedbpt.errors import ConfigError
from fedbpt.protocol import codec
from fedbpt.protocol.specs import LayerReadout
from fedbpt.runs.dev_figures import judged_loss
from fedbpt.runs.events import Evaluated, RoundClosed, RunStarted
from fedbpt.runs.result import RunResult
from fedbpt.runs.settings import RunSettings, stored_settings
from tests.support.raises import raises
from tests.support.toy_scene import StopRunError, stop
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK
from tests.unit.coordinator.test_federation_fit import SETTINGS, TEST, FitScene, nth, same

DEFAULT: dict[str, Any] = {"readout": "auto", "baselines": False}


class LayerScene(FitScene):
    def run(self, run: str = "r", **changes: Any) -> RunResult:
        return super().run(run, **{**DEFAULT, **changes})


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[LayerScene]:
    scene = LayerScene(tmp_path / "runs.sqlite")
    yield scene
    scene.store.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunResult, LayerScene]]:
    """An undisturbed run."""
    scene = LayerScene(tmp_path_factory.mktemp("whole") / "runs.sqlite")
    result = scene.run()
    yield result, scene
    scene.store.close()


def test_hidden_states_are_read_before_and_after_the_search(whole: tuple[RunResult, LayerScene]) -> None:
    result, scene = whole
    assert scene.purposes() == ["selection", "calibration", "probe", "search", "readout"]
    assert (set(result.fits), set(result.layer_fits)) == ({"calibration"}, {"probe", "readout"})
    assert result.others == ()
    assert codec.decode(codec.encode(result), RunResult) == result


def test_what_is_shipped_is_one_of_the_lines_that_were_measured(whole: tuple[RunResult, LayerScene]) -> None:
    result, _ = whole
    assert set(result.baselines) == {"calibrated", "probe", "prompt", "read"}
    assert result.shipped in result.baselines
    assert result.tuned == result.baselines[result.shipped]


@pytest.mark.parametrize("shipped", ["calibrated", "probe", "prompt", "read"])
def test_the_prompt_of_each_line_scores_as_that_line_did(whole: tuple[RunResult, LayerScene], shipped: Any) -> None:
    result = msgspec.structs.replace(whole[0], shipped=shipped)
    prompt = make_prompt(ToyScorer(), TASK, result)
    found = evaluate(ToyScorer(), TASK, [*TEST["a"], *TEST["b"]], prompt)
    expected = result.baselines[shipped]
    assert (found.n, found.correct) == (expected.n, expected.correct)
    assert found.loss == pytest.approx(expected.loss, abs=1e-6)
    assert (prompt.layer_readout is not None) == (shipped in ("probe", "read"))


@pytest.mark.parametrize("purpose", ["probe", "readout"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_run_stopped_between_the_exchanges_of_a_fit_resumes_to_the_same_result(
    whole: tuple[RunResult, LayerScene], scene: LayerScene, purpose: str, number: int
) -> None:
    scene.when(nth(purpose, number), stop)
    with pytest.raises(StopRunError):
        scene.run()
    stopped = scene.of(RoundClosed)[-1].round
    result = scene.run()
    assert scene.of(RunStarted)[-1].resumed == stopped + 1
    same(result, whole[0])
    assert (result.layer_fits, result.shipped) == (whole[0].layer_fits, whole[0].shipped)


def test_a_stored_run_replays_without_its_devices(
    whole: tuple[RunResult, LayerScene], capsys: pytest.CaptureFixture[str]
) -> None:
    result, scene = whole
    settings = stored_settings(scene.store.get_run("r").settings)
    ledger = RunLedger(scene.store, "r", TASK, settings, settings.aggregator())
    assert ledger.replay_stored() == len(list(scene.store.rounds("r")))
    assert ledger.state.aggregator.digest() == result.digest
    readout = ledger.state.readout("readout")
    assert isinstance(readout, LayerReadout)
    np.testing.assert_array_equal(readout.weights.numpy(), result.layer_fits["readout"].weights.numpy())
    cli.make_app()(["runs", "replay", "r", "--store", str(scene.store.path)], standalone_mode=False)
    assert result.digest in capsys.readouterr().out


def test_the_run_goes_on_whatever_the_default_is_called(whole: tuple[RunResult, LayerScene]) -> None:
    result, scene = whole
    assert scene.run(readout="layers") == result


def test_a_run_is_not_resumed_with_words(whole: tuple[RunResult, LayerScene]) -> None:
    with raises(ConfigError, field="run"):
        whole[1].run(readout="words")


def test_a_run_begun_with_words_goes_on_with_words_by_default(scene: LayerScene) -> None:
    first = scene.run(readout="words")
    assert first.layer_fits == {}
    assert scene.run() == first
    longer = scene.run(rounds=4)
    assert (longer.rounds, longer.layer_fits, longer.settings.readout) == (4, {}, "words")


def test_settings_that_exclude_hidden_states_have_the_identity_of_earlier_versions() -> None:
    for changes in ({"calibrate": False}, {"robust": "median"}):
        settings = [RunSettings(readout=readout, **changes).identity() for readout in ("auto", "words")]
        assert settings[0] == settings[1]
    assert RunSettings().identity() == RunSettings(readout="layers").identity()
    assert RunSettings().identity() != RunSettings(readout="words").identity()


def test_on_the_way_the_readout_without_prompt_is_shown_and_the_prompt_is_judged(scene: LayerScene) -> None:
    result = scene.run(rounds=6, evaluate_every=2)
    first, fitted, *later, last = scene.of(Evaluated)
    assert (first.round, first.score) == (0, first.zero_shot)
    assert fitted.score == fitted.stages["probe"]  # before the search, as the curve shows it
    assert judged_loss({line.round: line.metrics for line in scene.store.history("r")}[fitted.round]) is None
    assert len(later) == 2
    for event in later:
        assert event.score == event.stages["probe"]
        figures = {line.round: line.metrics for line in scene.store.history("r")}[event.round]
        assert figures["judged_loss"] == pytest.approx(event.stages["prompt"].loss)
    assert last.score == last.stages[result.shipped]


def test_label_words_too_long_to_be_scored_leave_hidden_states_alone(scene: LayerScene) -> None:
    long = tuple(msgspec.structs.replace(each, label_words=("b" * 61, "g" * 61)) for each in TASK.templates)
    task = msgspec.structs.replace(TASK, templates=long)
    for device in scene.devices.values():
        device._task = task
    result = scene.federation("r", task, **{**SETTINGS, **DEFAULT}).run()
    assert scene.purposes() == ["probe"]
    assert (result.rounds, set(result.layer_fits), result.fits) == (0, {"probe"}, {})
    assert (result.zero_shot.n, result.tuned.n) == (0, 22)
    assert not result.latent.any()
    prompt = make_prompt(ToyScorer(), task, result)
    found = evaluate(ToyScorer(), task, [*TEST["a"], *TEST["b"]], prompt)
    assert (found.correct, found.n) == (result.tuned.correct, 22)
