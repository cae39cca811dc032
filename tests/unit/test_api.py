"""The Python API on the toy model: `tune`, `evaluate`, `Budget`."""

from __future__ import annotations

import asyncio
import builtins
import gc
import json
import weakref
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbpt import Budget, ObjectiveSpec, Prompt, PromptSpec, TuneResult, evaluate, tune
from fedbpt.errors import ConfigError, DataError, MissingExtraError, PromptError
from fedbpt.runs.events import Event, RoundClosed, RunFinished, RunStarted
from fedbpt.runs.intervals import wilson_interval
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows

SPEC = PromptSpec(d=6, alpha=2.0, seed=5)
TRAIN = rows(24)


def tuned(rounds: int = 12, seed: int = 5, **changes: Any) -> TuneResult:
    given = {"train": TRAIN, "budget": Budget(evaluations=8 * rounds), "prompt": SPEC, "popsize": 8, **changes}
    return tune(ToyScorer(), TASK, seed=seed, **given)


@pytest.fixture(scope="module")
def result() -> TuneResult:
    return tuned(dev=rows(6, first=100), evaluate_every=4)


@pytest.mark.parametrize("seed", [5, 6, 7])
def test_tuning_lowers_the_loss_of_rows_that_it_never_saw(seed: int) -> None:
    spec = PromptSpec(d=6, alpha=2.0, seed=seed)
    # A quarter of the rows judges what is shipped: of 24 rows 6, which are too few to tell.
    result = tuned(rounds=30, seed=seed, train=rows(60), prompt=spec, objective=ObjectiveSpec(batch_size=0))
    held_out = rows(40, first=200)
    before = evaluate(ToyScorer(), TASK, held_out, template=result.template)
    after = evaluate(ToyScorer(), TASK, held_out, prompt=result.prompt)
    assert after.loss < before.loss - 0.05
    assert after.accuracy > before.accuracy


def test_the_same_seed_gives_the_same_prompt_bit_for_bit_and_another_seed_another(result: TuneResult) -> None:
    again = tuned()
    assert again.prompt.rows.tobytes() == result.prompt.rows.tobytes()
    assert again.run.digest == result.run.digest
    assert again.curve == result.curve
    other = tuned(seed=6, prompt=None)
    assert other.run.settings.prompt.seed == 6
    assert other.run.mean != result.run.mean


def test_curves_and_history_tell_of_the_run(result: TuneResult) -> None:
    assert [evaluations for evaluations, _ in result.curve] == [8 * round for round in range(1, 13)]
    assert [evaluations for evaluations, _ in result.dev_curve] == [0, 0, 32, 64, 96]  # with a readout, too
    (history,) = result.prompt.history
    assert history["evaluations"] == result.run.evaluations == 96
    assert history["digest"] == result.run.digest
    assert "96 evaluations" in repr(result)
    assert "toy-mood" in repr(result)


def test_after_a_run_only_the_callers_name_holds_the_model() -> None:
    scorer = ToyScorer()
    freed = weakref.ref(scorer)
    gc.disable()
    try:
        tune(scorer, TASK, TRAIN, budget=Budget(evaluations=16), prompt=SPEC, show=False)
        del scorer
        assert freed() is None
    finally:
        gc.enable()


def test_events_are_passed_on_in_order() -> None:
    events: list[Event] = []
    tuned(rounds=2, on_event=events.append)
    assert isinstance(events[0], RunStarted)
    rounds = [event for event in events if isinstance(event, RoundClosed)]
    assert [event.round for event in rounds] == list(range(len(rounds)))
    assert [purpose for purpose, _ in groupby(event.purpose for event in rounds)] == [
        "selection", "calibration", "probe", "search", "readout",
    ]  # fmt: skip
    assert rounds[-1].searched == 2
    assert isinstance(events[-1], RunFinished)


def rounds_within(budget: Budget) -> list[RoundClosed]:
    """The rounds of a run."""
    events: list[Event] = []
    tuned(budget=budget, on_event=events.append)
    return [event for event in events if isinstance(event, RoundClosed)]


@pytest.fixture(scope="module")
def beforehand() -> int:
    """The tokens counted before the search begins."""
    tokens = {event.purpose: event.tokens for event in rounds_within(Budget(evaluations=1))}
    return tokens["probe"] - tokens["selection"]


@pytest.mark.parametrize(
    ("budget", "rounds"), [({"evaluations": 9}, 2), ({"tokens": 1}, 1), ({"evaluations": 800, "tokens": 1}, 1)]
)
def test_a_budget_ends_the_search_at_its_first_limit(budget: dict[str, int], rounds: int, beforehand: int) -> None:
    if "tokens" in budget:
        budget = {**budget, "tokens": beforehand + budget["tokens"]}
    assert rounds_within(Budget(**budget))[-1].searched == rounds


def test_tokens_that_the_fits_before_the_search_took_are_charged(beforehand: int) -> None:
    assert rounds_within(Budget(tokens=beforehand))[-1].searched == 0


def test_a_budget_of_seconds_ends_the_run() -> None:
    run = tuned(budget=Budget(seconds=0.2)).run  # which has no other limit
    assert run.settings.seconds == 0.2


def test_without_a_budget_there_are_1600_evaluations() -> None:
    assert Budget().limits() == {"rounds": 0, "evaluations": 1600, "tokens": 0, "seconds": 0}


@pytest.mark.parametrize("wrong", [{"evaluations": 0}, {"tokens": -1}, {"seconds": 0.0}, {"seconds": float("nan")}])
def test_a_budget_of_nothing_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Budget(**wrong)


def test_zero_shot_uses_the_given_template_or_the_tasks_first() -> None:
    first = evaluate(ToyScorer(), TASK, TRAIN)
    assert first.loss == evaluate(ToyScorer(), TASK, TRAIN, template=TASK.templates[0]).loss
    assert first.loss != evaluate(ToyScorer(), TASK, TRAIN, template=TASK.templates[1]).loss


def test_an_evaluation_counts_its_own_predictions() -> None:
    found = evaluate(ToyScorer(), TASK, TRAIN)
    truth = np.array([label for _, label in TRAIN])
    assert found.correct == int((found.predictions == truth).sum())
    assert found.n == len(TRAIN)
    low, high = found.interval
    assert low <= found.accuracy <= high
    assert f"accuracy={found.accuracy:.4f}" in repr(found)


def test_wilson_s_interval_is_that_of_the_textbook() -> None:
    # Newcombe (Stat. Med. 17, 1998), table I, method 3
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_a_saved_prompt_evaluates_the_same(result: TuneResult, tmp_path: Path) -> None:
    loaded = Prompt.load(result.prompt.save(tmp_path / "p.safetensors"))
    before, after = (evaluate(ToyScorer(), TASK, TRAIN, prompt) for prompt in (result.prompt, loaded))
    assert after.loss == before.loss


def test_a_prompt_of_another_model_is_refused_by_name(result: TuneResult) -> None:
    with pytest.raises(PromptError, match=r"toy.*other"):
        evaluate(ToyScorer(seed=9, name="other"), TASK, TRAIN, result.prompt)


def test_a_prompt_for_other_labels_is_refused(result: TuneResult) -> None:
    other = type(TASK)(name="toy", labels=("down", "up"), templates=TASK.templates)
    with pytest.raises(ConfigError, match=r"negative.*down"):
        evaluate(ToyScorer(), other, TRAIN, result.prompt)


def test_rows_may_be_pairs_an_iterator_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": text, "label": TASK.labels[label]}) for text, label in TRAIN]
    file.write_text("\n".join(lines))
    losses = {evaluate(ToyScorer(), TASK, given).loss for given in (TRAIN, iter(TRAIN), file, str(file))}
    assert len(losses) == 1


@pytest.mark.parametrize("wrong", [[], [("text", 2)], [("", 0)], ["text"], [("text", "nice")]])
def test_rows_that_cannot_be_are_refused(wrong: list[Any]) -> None:
    with pytest.raises(DataError):
        evaluate(ToyScorer(), TASK, wrong)
    with pytest.raises(DataError):
        tune(ToyScorer(), TASK, wrong)


def test_it_runs_inside_a_running_event_loop(result: TuneResult) -> None:
    async def notebook() -> TuneResult:
        return tuned()

    assert asyncio.run(notebook()).run.digest == result.run.digest


def test_plot_returns_a_figure_with_both_curves(result: TuneResult) -> None:
    from matplotlib.figure import Figure

    figure = result.plot()
    assert isinstance(figure, Figure)
    lines = [line for axes in figure.axes for line in axes.lines]
    assert [list(line.get_xdata()) for line in lines] == [[x for x, _ in result.curve], [0, 0, 32, 64, 96]]


def test_a_run_of_no_rounds_can_be_plotted() -> None:
    assert tuned(budget=Budget(tokens=1)).plot().axes


def test_plot_without_matplotlib_names_the_extra(result: TuneResult, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"fedbpt\[plot\]"):
        result.plot()
