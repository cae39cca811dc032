"""Results of a task whose label words are too long to be scored: the tuned figure alone, everywhere, and why."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from fedbpt import Budget, Prompt, PromptSpec, TuneResult, evaluate, tune
from fedbpt.cli.report import print_result, result_as_json
from fedbpt.dashboard import charts, texts
from fedbpt.dashboard.comparison import models_of_run
from fedbpt.dashboard.state import RunState
from fedbpt.dashboard.views import Point
from fedbpt.display.console import RunDisplay
from fedbpt.prompts.model_card import model_card
from fedbpt.runs.as_json import run_in_full
from fedbpt.runs.events import Evaluated, Event, RoundClosed, StageBegan, TemplateSelected
from fedbpt.runs.result import UNSCORED, Score
from fedbpt.runs.store import RunStore
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import LONG_WORDS, TASK, rows

SPEC = PromptSpec(d=6, alpha=2.0, placement="front", n_prompt=2)


class Run:
    """A run that is stored at ``path``: its result and events."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: list[Event] = []
        self.tuned: TuneResult = tune(
            ToyScorer(), LONG_WORDS, rows(40), rows(20, 200), rows(20, 400), budget=Budget(evaluations=32),
            prompt=SPEC, popsize=8, store=path, run="long", on_event=self.events.append, show=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run") / "runs.db")


@pytest.fixture(scope="module")
def scored() -> TuneResult:
    """The result of a task whose label words are scored."""
    data = (rows(40), rows(20, 200), rows(20, 400))
    return tune(ToyScorer(), TASK, *data, budget=Budget(evaluations=16), prompt=SPEC, popsize=8, show=False)


@pytest.fixture
def state(run: Run) -> Iterator[RunState]:
    with RunStore(run.path) as store:
        state = RunState("long")
        state.refresh(store)
        yield state


def test_it_ships_the_readout_alone_and_has_no_zero_shot_figure(run: Run) -> None:
    result = run.tuned.run
    assert result.is_unscored
    assert result.shipped == "probe"
    assert (result.zero_shot.n, result.tuned.n) == (0, 20)
    for split in ("test", "dev"):
        scores = result.scores(split)
        assert list(scores) == ["probe", "tuned"]
        assert scores["tuned"] == scores["probe"]
    assert run.tuned.prompt.layer_readout == result.layer_fits["probe"]
    assert not run.tuned.prompt.layer_readout.word_scales.numpy().any()


def test_its_prompt_gives_the_figure_that_was_measured(run: Run, tmp_path: Path) -> None:
    prompt = Prompt.load(run.tuned.prompt.save(tmp_path / "p.safetensors"))
    judged = evaluate(ToyScorer(), LONG_WORDS, rows(20, 400), prompt)
    assert judged.correct == run.tuned.run.tuned.correct
    assert judged.loss == pytest.approx(run.tuned.run.tuned.loss, abs=1e-5)


def test_no_label_word_is_scored_before_or_after_the_readout(run: Run) -> None:
    evaluated = [event for event in run.events if isinstance(event, Evaluated)]
    assert evaluated
    assert all(event.is_unscored for event in evaluated)
    assert {event.stage for event in run.events if isinstance(event, StageBegan)} == {"probe", "evaluation"}
    assert {event.purpose for event in run.events if isinstance(event, RoundClosed)} == {"probe"}


def test_a_notebook_shows_the_tuned_figure_alone_and_why(run: Run, scored: TuneResult) -> None:
    html = run.tuned._repr_html_()
    assert UNSCORED in html
    assert f"{run.tuned.run.tuned.accuracy:.3f} [" in html
    assert "→ " not in html.partition("labels")[0]
    assert UNSCORED not in scored._repr_html_()
    assert f"{scored.run.zero_shot.accuracy:.3f} → {scored.run.tuned.accuracy:.3f} [" in scored._repr_html_()


def test_the_terminal_shows_the_tuned_figure_alone_and_why_once(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with RunDisplay() as display:
        for event in run.events:
            display(event)
    shown = capsys.readouterr().err
    assert shown.count(UNSCORED) == 1
    assert "zero-shot" not in shown.replace(UNSCORED, "")
    assert f"acc {run.tuned.run.dev['tuned'].accuracy:.3f}" in shown


def test_long_label_words_are_listed_in_part(capsys: pytest.CaptureFixture[str]) -> None:
    words = tuple(f"word {i}" for i in range(200))
    template = msgspec.structs.replace(LONG_WORDS.templates[0], label_words=words)
    with RunDisplay() as display:
        display(TemplateSelected(template=template, index=0, losses=()))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("template ")]
    assert "word 3" in line
    assert "200 label words" in line
    assert "word 199" not in line


def test_the_tables_show_the_tuned_figure_alone_and_why(
    run: Run, scored: TuneResult, capsys: pytest.CaptureFixture[str]
) -> None:
    print_result(run.tuned.run, None)
    shown = capsys.readouterr().out
    assert shown.count(UNSCORED) == 2  # below either table
    assert "zero-shot" not in shown.replace(UNSCORED, "")
    assert "readout without prompt" in shown
    print_result(scored.run, None)
    shown = capsys.readouterr().out
    assert UNSCORED not in shown
    assert "zero-shot" in shown


def test_json_has_null_for_what_was_not_measured(run: Run, scored: TuneResult) -> None:
    found = json.loads(msgspec.json.encode(result_as_json(run.tuned.run, None)))
    assert found["zero_shot_accuracy"] is None
    assert found["tuned_accuracy"] == run.tuned.run.tuned.accuracy
    assert found["shipped"] == "probe"
    assert set(found["dev"]) == {"probe", "tuned"}
    assert result_as_json(scored.run, None)["shipped"] == scored.run.shipped


def test_a_stored_run_has_no_metrics_of_zero_shot(run: Run) -> None:
    with RunStore(run.path) as store:
        (stored,) = store.list_runs()
        rounds = run_in_full(store, stored)["rounds"]
    names = {name for line in rounds for name in line["metrics"]}
    assert "dev_accuracy" in names
    assert "test_accuracy" in names
    assert [name for name in names if "zero_shot" in name] == []
    assert all(math.isfinite(value) for line in rounds for value in line["metrics"].values())


def test_the_dashboard_shows_the_tuned_figure_alone_and_why(run: Run, state: RunState) -> None:
    view = state.view()
    assert view.unscored
    assert view.zero_shot is view.zero_shot_interval is None
    assert view.figure == run.tuned.run.dev["tuned"].accuracy
    assert [stage.title for stage in view.stages] == ["readout without prompt", "tuned"]
    assert view.path == ("probe", "evaluation")
    assert texts.basis(view) == f"{UNSCORED} · 20 development rows"
    assert texts.gain(view) == ""


def test_the_dashboard_without_development_rows_has_no_zero_shot_either(tmp_path: Path) -> None:
    tune(
        ToyScorer(), LONG_WORDS, rows(40), test=rows(20, 400), prompt=SPEC, popsize=8,
        store=tmp_path / "runs.db", run="long", show=False,
    )  # fmt: skip
    with RunStore(tmp_path / "runs.db") as store:
        state = RunState("long")
        state.refresh(store)
    assert (state.view().split, state.view().zero_shot, state.view().unscored) == ("test", None, True)


def test_the_dashboards_curve_has_no_line_to_beat(state: RunState) -> None:
    points = state.dev_points()
    assert points
    assert [point.zero_shot for point in points] == [None] * len(points)
    options = charts.curve("Accuracy by round", " %")
    charts.set_curves(options, {"tuned": ([Point(0, 75.0)], "red", 3)}, points[-1].zero_shot)
    assert "markLine" not in json.dumps(options)


def test_the_compare_page_answers_on_both_sides(run: Run) -> None:
    pair = models_of_run(ToyScorer(), LONG_WORDS, run.tuned.run)
    found = pair.classify("aaa number 1")
    assert sum(found.original) == pytest.approx(1)
    assert sum(found.tuned) == pytest.approx(1)


def test_the_model_card_shows_the_tuned_figure_alone_and_why(run: Run) -> None:
    card = model_card(run.tuned.prompt, "USE\n")
    assert "| zero-shot |" not in card
    assert "| tuned |" in card
    assert f"{UNSCORED[0].upper()}{UNSCORED[1:]}." in card


def test_results_of_earlier_versions_are_not_taken_for_it(scored: TuneResult) -> None:
    old = Evaluated(round=1, score=Score(n=5, correct=3, loss_sum=2.0), devices=("a",))
    assert not old.is_unscored
    assert not scored.run.is_unscored
