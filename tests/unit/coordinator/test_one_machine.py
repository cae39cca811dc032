"""A run on one machine: `fedbpt.tune` with a store, ``fedbpt tune --data``; both resume."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedbpt import Budget, Prompt, PromptSpec, TuneResult, tune
from fedbpt.cli import tune as tune_command
from fedbpt.cli import tuning
from fedbpt.display.console import RunDisplay
from fedbpt.errors import ConfigError, PromptError
from fedbpt.prompts.prompt import card_path
from fedbpt.runs.events import Event, RoundClosed, RunFinished, RunStarted
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore
from tests.support.raises import raises
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, TASK_FILE, rows
from tests.unit.cli.test_cli import Answer, Run, folder, run

pytestmark = pytest.mark.slow

__all__ = ["folder", "run"]

TRAIN, DEV, TEST = rows(24), rows(8, first=100), rows(40, first=200)
Listener = Callable[[Event], None]


def tuned(**changes: Any) -> TuneResult:
    given: dict[str, Any] = {"budget": Budget(evaluations=64), "prompt": PromptSpec(d=6), "popsize": 8, **changes}
    return tune(ToyScorer(), TASK, given.pop("train", TRAIN), show=False, **given)


def interrupted_at(*rounds: int) -> Listener:
    """Ctrl-C once after each of these numbers of closed rounds of the search."""
    left = list(rounds)

    def listen(event: Event) -> None:
        if isinstance(event, RoundClosed) and left and event.searched >= left[0]:
            left.pop(0)
            raise KeyboardInterrupt

    return listen


# --- in Python -------------------------------------------------------------------------------------------------------


def test_a_stored_run_is_returned_unchanged_with_its_curves(tmp_path: Path) -> None:
    store, events = tmp_path / "new" / "runs.db", list[Event]()
    first = tuned(dev=DEV, test=TEST, evaluate_every=4, store=store)
    again = tuned(dev=DEV, test=TEST, evaluate_every=4, store=store, on_event=events.append)
    assert [type(event) for event in events] == [RunFinished]
    assert again.prompt == first.prompt
    assert (again.curve, again.dev_curve) == (first.curve, first.dev_curve)
    assert again.run == first.run
    assert tuned(dev=DEV, evaluate_every=4).curve == first.curve
    with RunStore(store) as opened:
        assert [(found.run, found.status) for found in opened.list_runs()] == [("tune", "finished")]


def test_an_interrupted_run_resumes_to_the_same_prompt(tmp_path: Path) -> None:
    class BrokenError(Exception):
        pass

    def break_off(event: Event) -> None:
        if isinstance(event, RoundClosed) and event.searched == 3:
            raise BrokenError

    events: list[Event] = []
    with pytest.raises(BrokenError):
        tuned(store=tmp_path / "runs.db", on_event=break_off)
    result = tuned(store=tmp_path / "runs.db", on_event=events.append)
    assert next(event.resumed for event in events if isinstance(event, RunStarted)) > 3
    whole = tuned()
    assert result.prompt.rows.tobytes() == whole.prompt.rows.tobytes()
    assert result.curve == whole.curve


def test_ctrl_c_keeps_the_result_so_far_and_the_same_call_resumes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "runs.db"
    with caplog.at_level(logging.WARNING, "fedbpt"):
        stopped = tuned(test=TEST, store=store, on_event=interrupted_at(3))
    assert "after 3 rounds" in caplog.text
    assert stopped.interrupted
    assert stopped.run.rounds == 3
    assert stopped.run.tuned.n == len(TEST)
    assert stopped.run.readout is not None
    whole = tuned(test=TEST, store=store)
    assert not whole.interrupted
    assert whole.run.rounds == 8
    assert whole.prompt.rows.tobytes() == tuned(test=TEST).prompt.rows.tobytes()
    assert whole.curve[:3] == stopped.curve


def test_ctrl_c_keeps_the_result_so_far_without_a_store() -> None:
    stopped, short = tuned(on_event=interrupted_at(3)), tuned(budget=Budget(evaluations=24))
    assert stopped.prompt.rows.tobytes() == short.prompt.rows.tobytes()
    assert stopped.prompt.readout == short.prompt.readout


def test_ctrl_c_before_the_first_round_or_twice_is_raised() -> None:
    for rounds in ((0,), (2, 2)):
        with pytest.raises(KeyboardInterrupt):
            tuned(on_event=interrupted_at(*rounds))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"train": TRAIN[::-1]}, ConfigError),
        ({"dev": DEV}, ConfigError),
        ({"test": TEST}, ConfigError),
        ({"seed": 3}, ConfigError),
        ({"popsize": 6}, ConfigError),
    ],
)
def test_a_stored_run_of_other_rows_or_settings_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception]
) -> None:
    tuned(store=tmp_path / "runs.db", evaluate_every=0)
    with pytest.raises(error):
        tuned(store=tmp_path / "runs.db", evaluate_every=0, **changes)
    tuned(store=tmp_path / "runs.db", run="other", **changes)


def test_a_stored_run_of_another_model_is_refused(tmp_path: Path) -> None:
    tuned(store=tmp_path / "runs.db")
    with raises(PromptError):
        tune(
            ToyScorer(seed=1, name="other"), TASK, TRAIN, budget=Budget(evaluations=64), prompt=PromptSpec(d=6),
            popsize=8, store=tmp_path / "runs.db",
        )  # fmt: skip


def test_test_rows_give_the_result_and_its_card_figures(tmp_path: Path) -> None:
    result = tuned(test=TEST)
    assert (result.run.zero_shot.n, result.run.tuned.n) == (len(TEST), len(TEST))
    card = card_path(result.prompt.save(tmp_path / "p.safetensors")).read_text()
    low, high = result.prompt.history[-1]["tuned_interval"]
    assert f"| tuned | {result.run.tuned.accuracy:.3f} | {low:.3f} – {high:.3f} | {len(TEST)} |" in card


# --- by the command line ---------------------------------------------------------------------------------------------

ALONE = ("tune", "--model", "toy", "--task", "mood.toml", "--data", "train.csv")
SHORT = ("--evaluations", "64")


@pytest.fixture(autouse=True)
def files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_command, "load_model", lambda *_args, **_options: ToyScorer())
    (folder / "mood.toml").write_text(TASK_FILE)
    for name, split in (("train", TRAIN), ("test", TEST), ("other", TRAIN[:12])):
        lines = [f"{text},{TASK.labels[int(label)]}" for text, label in split]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *lines]) + "\n")


def test_one_command_tunes_and_writes_prompt_and_card(run: Run, folder: Path) -> None:
    answer = run(*ALONE, "--test", "test.csv", *SHORT)
    assert answer.code == 0, answer.err
    assert ": 40 test rows" in answer.out
    assert "prompt: runs/toy-mood.safetensors" in answer.out
    assert [line for line in answer.err.splitlines() if line.startswith("round ")]  # progress for scripts
    prompt = Prompt.load(folder / "runs" / "toy-mood.safetensors")
    assert prompt.task == TASK
    assert prompt.history[-1]["tuned_n"] == 40
    assert "| tuned |" in card_path(folder / "runs" / "toy-mood.safetensors").read_text()
    assert run("runs", "list", "--quiet").out == "toy-mood\n"
    said = json.loads(run(*ALONE, "--test", "test.csv", *SHORT, "--json").out)
    assert (said["run"], said["n"], said["prompt_path"]) == ("toy-mood", 40, "runs/toy-mood.safetensors")


def test_quiet_prints_only_the_result(run: Run) -> None:
    answer = run(*ALONE, *SHORT, "--quiet")
    assert (answer.code, answer.err) == (0, "")
    assert "64 evaluations" in answer.out


def test_settings_come_from_the_run_file(run: Run, folder: Path) -> None:
    text = 'task = "mood.toml"\nrun = "short"\nprompt_file = "p.st"\n[settings]\nrounds = 2\npopsize = 4\n'
    (folder / "run.toml").write_text(text)
    said = json.loads(run("tune", "run.toml", "--data", "train.csv", "--model", "toy", "--json").out)
    assert (said["run"], said["rounds"], said["evaluations"], said["prompt_path"]) == ("short", 2, 8, "p.st")
    (folder / "run.toml").write_text('devices = ["http://pi5"]\n' + text)
    assert "run.toml" in run("tune", "run.toml", "--data", "train.csv", "--model", "toy").err


def test_other_rows_need_another_name_or_a_fresh_start(run: Run) -> None:
    first = json.loads(run(*ALONE, *SHORT, "--json").out)
    other = (*ALONE[:-1], "other.csv", *SHORT, "--json")
    refused = run(*other)
    assert (refused.code, refused.out) == (2, "")
    assert json.loads(run(*ALONE, *SHORT, "--json").out) == first  # it is still stored
    assert json.loads(run(*other, "--run", "other").out)["run"] == "other"
    fresh = json.loads(run(*other, "--fresh").out)
    assert fresh["digest"] != first["digest"]
    assert json.loads(run(*other).out) == fresh


def test_a_fresh_start_that_fails_leaves_the_finished_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(*ALONE, *SHORT, "--json")
    assert run(*ALONE, *SHORT, "--fresh", "--monitor", "bogus").code == 2
    with monkeypatch.context() as patch:
        patch.setattr(RunSettings, "aggregator", lambda _settings: 1 // 0)
        assert run(*ALONE, *SHORT, "--fresh").code == 1
    assert run(*ALONE, *SHORT, "--json") == first


class Interrupting(RunDisplay):
    """Ctrl-C when two rounds of the search are closed."""

    def __init__(self, shown: bool) -> None:
        super().__init__(shown)
        self._interrupt = interrupted_at(2)

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        self._interrupt(event)


def test_ctrl_c_writes_the_result_so_far_and_says_how_to_resume(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (*ALONE, "--test", "test.csv", *SHORT, "--out", "p.st")
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "RunDisplay", Interrupting)
        answer: Answer = run(*command)
    assert answer.code == 130
    assert "32 evaluations in 2 rounds" in answer.out
    assert answer.err.splitlines()[-1].endswith(": fedbpt " + " ".join(command))
    assert Prompt.load(folder / "p.st").history[-1]["tuned_n"] == 40
    said = json.loads(run(*command, "--json").out)
    assert (said["rounds"], said["evaluations"]) == (4, 64)


def test_the_plan_of_a_run_on_this_machine(run: Run, folder: Path) -> None:
    said = json.loads(run(*ALONE, *SHORT, "--plan", "--json").out)
    assert [device["name"] for device in said["devices"]] == ["this-machine"]
    assert said["evaluations"] == 64
    assert not (folder / "runs" / "runs.db").exists()
