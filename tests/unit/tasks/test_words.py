"""The cost of label words of several tokens is noted at load, and counted in a run's plan."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from fedbpt import Budget, PromptSpec, tune
from fedbpt.cli.hint import print_hint
from fedbpt.cli.report import print_cost
from fedbpt.coordinator.clients import InProcessClient
from fedbpt.coordinator.costs.estimate import RunCost, estimate
from fedbpt.coordinator.federation import Federation
from fedbpt.device.device import Device
from fedbpt.device.speed import measure_speed
from fedbpt.errors import ConfigError
from fedbpt.protocol.specs import ObjectiveSpec, Template
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore
from fedbpt.tasks import Task, word_costs, word_notes
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows

CUE = "{text}\nMood:"
LONG = (
    Template(pattern=CUE, label_words=("bad", "goods")),
    Template(pattern="{text}\nIt was:", label_words=("d", "f")),
)
DEAR = msgspec.structs.replace(TASK, templates=LONG)
"""The first template's words have 3 and 5 tokens in the toy model, whose tokens are bytes."""

KNOWN = (" billing", " technical", "billing", "\nDepartment", ":", " ")


class GreedyTokenizer:
    """Takes the longest known piece each time, else a character."""

    def tokenize(self, text: str, add_bos: bool | None = None) -> NDArray[np.int32]:
        ids = [] if add_bos is False else [0]
        while text:
            piece = max((known for known in KNOWN if text.startswith(known)), key=len, default=text[0])
            ids.append(1 + KNOWN.index(piece) if piece in KNOWN else 100 + ord(piece))
            text = text[len(piece) :]
        return np.array(ids, dtype=np.int32)


def support(*words: str, labels: tuple[str, ...] = ("billing", "technical")) -> Task:
    return Task(name="t", labels=labels, templates=(Template(pattern="{text}\nDepartment:", label_words=words),))


def test_the_tokens_of_each_word_are_counted_as_it_follows_the_cue() -> None:
    assert [costs.tokens for costs in word_costs(ToyScorer(), DEAR)] == [(3, 5), (1, 1)]
    assert [costs.extra for costs in word_costs(ToyScorer(), DEAR)] == [6, 0]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ((" billing", " technical "), [" 2 tokens", "' technical ' is 2 tokens", "' technical' is 1"]),
        ((" billing", " technical  "), [" 3 tokens", "' technical  ' is 3 tokens", "' technical' is 1"]),
        ((" billing ", " technical"), ["' billing ' is 2 tokens", "' billing' is 1"]),
        (("  billing", " technical"), ["'  billing' is 2 tokens", "' billing' is 1"]),
        ((" billing", "technical"), ["'technical' is 9 tokens", "' technical' is 1"]),
        ((" billing", " xyz"), ["' xyz' is 4 tokens"]),
    ],
)
def test_an_extra_or_missing_space_is_noted_with_its_cost(words: Any, parts: list[str]) -> None:
    (note,) = word_notes(GreedyTokenizer(), support(*words))
    assert "\n" not in note
    assert [part for part in parts if part not in note] == []


def test_words_of_one_token_are_not_noted() -> None:
    assert word_notes(GreedyTokenizer(), support(" billing", " technical")) == []
    assert word_notes(GreedyTokenizer(), support("billing", " technical")) == []
    assert word_notes(ToyScorer(), TASK) == []


def test_a_template_that_the_model_cannot_use_is_noted() -> None:
    (note,) = word_notes(GreedyTokenizer(), support(" billing", " billing x"))
    assert "' billing x'" in note


def test_many_words_are_not_all_listed() -> None:
    labels = tuple(f"l{i:02}" for i in range(40))
    (note,) = word_notes(GreedyTokenizer(), support(*(f" {label}" for label in labels), labels=labels))
    assert " more" in note
    assert len(note) < 800


def test_tuning_notes_the_cost_of_words_before_it_begins(caplog: pytest.LogCaptureFixture) -> None:
    budget, spec = Budget(evaluations=4), PromptSpec(d=4)
    with caplog.at_level(logging.WARNING):
        tune(ToyScorer(), TASK, rows(8), budget=budget, prompt=spec, popsize=4)
        assert not caplog.records
        tune(ToyScorer(), DEAR, rows(8), budget=budget, prompt=spec, popsize=4)
    (record,) = caplog.records
    assert "'goods' is 5 tokens" in record.getMessage()


def test_a_command_that_knows_task_and_model_hints_at_it(capsys: pytest.CaptureFixture[str]) -> None:
    scorer: Any = ToyScorer()
    scorer.hint = None
    print_hint(scorer, shown=True, task=DEAR)
    print_hint(scorer, shown=False, task=DEAR)
    print_hint(scorer, shown=True, task=TASK)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("hint: ") == err.count("\n") == 1


# --- a run's plan ----------------------------------------------------------------------------------------------------


def settings(method: Any = "pooled", placement: Any = "cue") -> RunSettings:
    objective = ObjectiveSpec(batch_size=4, max_text_tokens=16, readout_words=8)
    return RunSettings(
        rounds=6,
        popsize=4,
        iterations=2,
        method=method,
        prompt=PromptSpec(d=8, placement=placement),
        objective=objective,
        select_rows=4,
    )


def measured(task: Task = DEAR) -> Device:
    device = Device("d", ToyScorer(), rows(16), task=task)
    device.measure_speed()
    return device


def plan_of(asked: RunSettings, device: Device, task: Task = DEAR) -> RunCost:
    return estimate(asked, task, [device.info()], asked.aggregator())


@pytest.mark.parametrize("method", ["pooled", "fedavg"])
@pytest.mark.parametrize("placement", ["cue", "front"])
def test_a_plan_counts_the_tokens_of_the_label_words(method: Any, placement: Any) -> None:
    asked = settings(method, placement)
    device = measured()
    (cost,) = plan_of(asked, device).devices
    (cheap,) = plan_of(asked, measured(TASK), TASK).devices
    with RunStore(":memory:") as store:
        spent = Federation([InProcessClient(device)], DEAR, asked, asked.aggregator(), store, "r").run().tokens
    assert cheap.words == 0 < cost.words == 6
    assert cheap.tokens < cost.tokens
    assert 0.3 < spent / cost.tokens <= 1


def test_a_plan_counts_the_time_of_the_label_words() -> None:
    asked = settings()
    info = msgspec.structs.replace(measured().info(), tokens_per_second=100.0, word_tokens_per_second=10.0)
    same = msgspec.structs.replace(info, word_tokens_per_second=None)
    slow, usual = (estimate(asked, DEAR, [each], asked.aggregator()).devices[0] for each in (info, same))
    words = (slow.seconds - usual.seconds) / (1 / 10 - 1 / 100)  # type: ignore[operator]
    assert slow.tokens == usual.tokens
    assert 0 < words < slow.tokens
    assert usual.seconds == pytest.approx(usual.tokens / 100)
    longest = max(slow.texts, slow.probe, slow.others)  # round by tokens
    short = msgspec.structs.replace(asked, deadline_s=longest / 90)
    assert estimate(short, DEAR, [same], short.aggregator()).rounds == 6
    with pytest.raises(ConfigError, match="deadline_s"):
        estimate(short, DEAR, [info], short.aggregator())
    seconds = msgspec.structs.replace(asked, rounds=0, seconds=1000.0)
    fewer, more = (estimate(seconds, DEAR, [each], seconds.aggregator()).rounds for each in (info, same))
    assert fewer < more


def test_a_device_that_has_not_counted_them_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    asked = settings()
    uncounted = plan_of(asked, Device("d", ToyScorer(), rows(16), task=DEAR))
    other = plan_of(asked, measured(TASK))  # its own task file has other templates
    assert [cost.devices[0].words for cost in (uncounted, other)] == [None, None]
    print_cost(uncounted, as_json=False)
    assert capsys.readouterr().out.splitlines()[-1].startswith("d ")
    print_cost(plan_of(asked, measured()), as_json=False)
    assert "6 tokens" in capsys.readouterr().out


def test_a_task_of_target_texts_has_no_label_words_to_count() -> None:
    task = Task(name="manner", templates=(Template(pattern=CUE, label_words=()),))
    asked = settings()
    device = Device("d", ToyScorer(), [(text, "a target") for text, _ in rows(8)], task=task)
    assert device.measure_speed() > 0
    assert plan_of(asked, device, task).devices[0].words == 0


def test_the_dearest_template_is_what_is_measured() -> None:
    found = measure_speed(ToyScorer(), DEAR, "a text")
    assert sorted(found.word_tokens.values()) == [0, 6]
    assert (found.word_tokens_per_second or 0) > 0
    assert measure_speed(ToyScorer(), TASK, "a text").word_tokens_per_second is None
