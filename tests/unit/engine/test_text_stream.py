"""Tasks whose target is a text: tuned by its likelihood, reported by its perplexity."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fedbpt import Budget, Prompt, PromptSpec, TuneResult, cli, evaluate, tune
from fedbpt.cli import evaluate as evaluate_command
from fedbpt.cli import report
from fedbpt.display.plain_console import PlainConsole
from fedbpt.engine.text_stream import place
from fedbpt.errors import ConfigError, DataError, FedbptError, InputError, TaskError
from fedbpt.objective.objective import Objective
from fedbpt.protocol.specs import ObjectiveSpec, Template
from fedbpt.runs.events import Evaluated, RunFinished
from fedbpt.runs.settings import RunSettings
from fedbpt.tasks import Task, load_task, read_task_rows, to_rows, write_partition, write_rows
from fedbpt.tasks.task import target_ids
from tests.support.raises import raises
from tests.support.toy_scorer import ToyScorer

TASK_FILE = """
name = "manner"
label_column = "answer"
[[templates]]
pattern = "{text}\\nAnswer: ("
label_words = []
"""
TEMPLATE = Template(pattern="{text}\nAnswer: (", label_words=())
TASK = Task(name="manner", templates=(TEMPLATE,), label_column="answer")
NLL = ObjectiveSpec(loss="nll")
WORDS = ("zig", "zagg", "zoo")


def rows(n: int, first: int = 0) -> list[tuple[str, str]]:
    return [(f"question {i}", f"{WORDS[i % 3]} {WORDS[i % 2]}") for i in range(first, first + n)]


def objective(placement: str = "cue", spec: ObjectiveSpec = NLL) -> Objective:
    return Objective(ToyScorer(), TEMPLATE, (), rows(5), spec, PromptSpec(placement=placement, n_prompt=2, d=6))


@pytest.fixture(scope="module")
def tuned() -> TuneResult:
    spec = PromptSpec(d=6, alpha=2.0)
    budget = Budget(evaluations=8 * 20)
    return tune(ToyScorer(), TASK, rows(12), rows(6, 50), budget=budget, prompt=spec, popsize=8, evaluate_every=5)


@pytest.mark.parametrize("placement", ["front", "cue"])
def test_the_loss_is_the_mean_negative_log_likelihood_of_a_targets_tokens(placement: str) -> None:
    made, scorer = objective(placement), ToyScorer()
    embeds = made.embeds(np.random.default_rng(1).standard_normal((3, 6)))
    plans = [list(f" {target}".encode()) for _, target in rows(5)]
    for i, target in enumerate(plans):
        ids = scorer.tokenize(rows(5)[i][0] + "\nAnswer: (")
        text, prefix = (ids[1:], ids[:1]) if placement == "front" else (ids, None)
        found = scorer.log_probabilities([text], embeds, [[target]], placement, prefix)[:, 0, 0]
        np.testing.assert_allclose(made.losses(embeds, [i]), -found / len(target), rtol=1e-5)


def test_an_evaluation_has_losses_and_predicts_nothing() -> None:
    made = objective()
    embeds = made.embeds(np.random.default_rng(1).standard_normal((3, 6)))
    found = made.evaluate(embeds)
    np.testing.assert_allclose(np.array(found.loss_sums) / 5, made.losses(embeds))
    assert found.correct == (0, 0, 0)
    assert (found.predictions == -1).all()


def test_a_perturbed_objective_keeps_the_targets() -> None:
    made = objective(spec=ObjectiveSpec(loss="nll", perturb=0.5))
    ratio = made.losses(made.embeds(np.zeros((1, 6))), [3, 1], np.random.default_rng(0))
    assert np.isfinite(ratio).all()
    assert 0.5 < ratio[0] < 2


def test_tuning_makes_unseen_targets_likelier(tuned: TuneResult) -> None:
    held_out = rows(20, 100)
    before, after = evaluate(ToyScorer(), TASK, held_out), evaluate(ToyScorer(), TASK, held_out, tuned.prompt)
    assert after.perplexity < 0.9 * before.perplexity
    assert after.perplexity == pytest.approx(math.exp(after.loss))
    assert "perplexity=" in repr(after)
    assert tuned.dev_curve[0][1] > tuned.dev_curve[-1][1] > 1
    assert tuned.run.settings.objective.loss == "nll"
    assert not tuned.run.fits
    assert tuned.plot().axes[1].get_ylabel() == "perplexity"


def test_its_prompt_is_saved_without_labels(tuned: TuneResult, tmp_path: Path) -> None:
    again = Prompt.load(tuned.prompt.save(tmp_path / "p.safetensors"))
    assert again == tuned.prompt
    assert again.labels == ()
    held_out = rows(7, 100)
    assert evaluate(ToyScorer(), TASK, held_out, again).loss == evaluate(ToyScorer(), TASK, held_out, tuned.prompt).loss


def test_the_result_reports_perplexity(tuned: TuneResult, monkeypatch: pytest.MonkeyPatch) -> None:
    score = msgspec.structs.replace(tuned.run.tuned, n=4, loss_sum=4 * math.log(12.5))
    result = msgspec.structs.replace(tuned.run, zero_shot=score, tuned=score)
    found = report.result_as_json(result, None)
    assert found["tuned_perplexity"] == pytest.approx(12.5)
    assert "tuned_accuracy" not in found
    stream = io.StringIO()
    monkeypatch.setattr(report, "PlainConsole", lambda: PlainConsole(file=stream, width=200))
    report.print_result(result, None)
    assert "perplexity" in stream.getvalue()
    assert "12.50" in stream.getvalue()
    assert "accuracy" not in stream.getvalue()


def test_under_a_prompt_in_front_the_command_reports_perplexity_though_the_task_has_a_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place = PromptSpec(d=4, alpha=2.0, placement="front", n_prompt=2)
    tune(ToyScorer(), TASK, rows(8), budget=Budget(evaluations=16), prompt=place, show=False).prompt.save(
        tmp_path / "p"
    )
    (tmp_path / "manner.toml").write_text(f"{TASK_FILE}[generation]\nmetric = 'contains'\n")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a", "answer": "zig"}))
    monkeypatch.setattr(evaluate_command, "load_model", lambda *_args, **_options: ToyScorer())
    data = tmp_path / "rows.jsonl"
    given = [tmp_path / "p", "--data", data, "--task", tmp_path / "manner.toml", "--train", data, "--json"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", *map(str, given), "--model", "toy"])
    said = capfd.readouterr()
    assert ended.value.code == 0, said.err
    assert set(json.loads(said.out)["tuned"]) == {"n", "perplexity", "loss"}
    assert "prompt in front" in said.err


def test_more_rows_than_a_short_texts_tokens_are_refused() -> None:
    spec = PromptSpec(placement="cue", n_prompt=40, d=6)
    with raises(InputError, field="rows"):
        place(ToyScorer(), TEMPLATE, "short", rows=np.zeros((40, ToyScorer().n_embd), np.float32), prompt=spec)


def test_the_command_reports_perplexity(
    tuned: TuneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manner.toml").write_text(TASK_FILE)
    lines = [json.dumps({"text": text, "answer": target}) for text, target in rows(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    tuned.prompt.save(tmp_path / "p.safetensors")
    monkeypatch.setattr(evaluate_command, "load_model", lambda *_args, **_options: ToyScorer())
    given = [tmp_path / "p.safetensors", "--data", tmp_path / "rows.jsonl", "--task", tmp_path / "manner.toml"]
    for more in ([], ["--json"], ["--quiet"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["evaluate", *map(str, given), "--model", "toy", *more])
        assert ended.value.code == 0
    table, as_json, quiet = capfd.readouterr().out.rsplit("\n", 3)[:3]
    assert "perplexity" in table
    found = json.loads(as_json)["tuned"]
    assert set(found) == {"n", "perplexity", "loss"}
    assert quiet == f"{found['perplexity']:.4f}"


def test_a_task_file_may_have_no_labels_and_names_its_target_column(tmp_path: Path) -> None:
    (tmp_path / "manner.toml").write_text(TASK_FILE)
    task = load_task(tmp_path / "manner.toml")
    assert task == TASK
    (tmp_path / "rows.csv").write_text("text,answer\nwhat is it,a zoo\n")
    assert read_task_rows(task, tmp_path / "rows.csv") == [("what is it", "a zoo")]


def test_partitioned_rows_are_read_back(tmp_path: Path) -> None:
    manifest = write_partition(tmp_path, rows(10), (), 3)
    assert sum(part.rows for part in manifest.devices) == 10
    task = msgspec.structs.replace(TASK, label_column="label")
    again = [row for part in manifest.devices for row in read_task_rows(task, tmp_path / part.file)]
    assert sorted(again) == sorted(rows(10))
    write_rows(tmp_path / "all.jsonl", rows(3), ())
    assert read_task_rows(task, tmp_path / "all.jsonl") == rows(3)


def test_a_long_target_is_cut() -> None:
    assert target_ids(ToyScorer(), TEMPLATE, "abc", 3).tolist() == list(b" ab")


@pytest.mark.parametrize("given", [[("a", 1)], [("a", "")]])
def test_rows_without_a_target_are_refused(given: list[tuple[str, object]]) -> None:
    with raises(DataError):
        to_rows(given, TASK)


@pytest.mark.parametrize(
    ("labels", "spec", "row", "error", "field"),
    [
        ((), ObjectiveSpec(), "zoo", InputError, "loss"),
        (("no", "yes"), NLL, 1, InputError, "loss"),
        ((), NLL, 1, DataError, "label"),
        ((), NLL, " ", InputError, ""),
        (("no", "yes"), ObjectiveSpec(), "yes", DataError, "label"),
    ],
)
def test_inconsistent_arguments_are_refused(
    labels: tuple[str, ...], spec: ObjectiveSpec, row: object, error: type[FedbptError], field: str
) -> None:
    template = msgspec.structs.replace(TEMPLATE, label_words=("n", "y")[: len(labels)])
    with raises(error, field=field):
        Objective(ToyScorer(), template, labels, [("a", row)], spec, PromptSpec(d=6))


def test_a_run_of_a_labelled_task_by_likelihood_is_refused() -> None:
    with pytest.raises(ConfigError):
        RunSettings(objective=NLL).for_labels(("no", "yes"))


def test_label_words_without_labels_are_refused() -> None:
    with raises(TaskError, field="label_words"):
        Task(name="manner", templates=(Template(pattern="{text}\nAnswer: (", label_words=("a",)),))


def test_events_carry_losses_of_development_rows() -> None:
    events: list[object] = []
    tune(
        ToyScorer(),
        TASK,
        rows(6),
        rows(3, 50),
        budget=Budget(evaluations=8),
        prompt=PromptSpec(d=4),
        popsize=8,
        evaluate_every=1,
        on_event=events.append,
    )
    scores = [event.score for event in events if isinstance(event, Evaluated)]
    assert scores
    assert all(score.perplexity > 1 for score in scores)
    assert isinstance(events[-1], RunFinished)
