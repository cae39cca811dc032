"""`fedbpt.refine`: the search on a metric, with answers that follow from where the prompt is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from fedbpt import Budget, Prompt, PromptSpec, refining
from fedbpt.engine.text_generator import Answer, Sampling
from fedbpt.errors import PromptError
from fedbpt.objective.objective import Objective
from fedbpt.protocol.specs import ObjectiveSpec, Template
from fedbpt.tasks import Task
from tests.support.raises import raises
from tests.support.toy_scorer import ToyScorer

TASK = Task(name="toy", templates=(Template(pattern="{text}\nAnswer:", label_words=()),))
ROWS = [(f"text number {i}", f"target {i}") for i in range(40)]
SPEC = ObjectiveSpec(loss="nll", max_text_tokens=16, readout_words=0)


@pytest.fixture
def prompt() -> Prompt:
    objective = Objective(ToyScorer(), TASK.templates[0], (), ROWS[:1], SPEC, PromptSpec(d=8))
    return objective.as_prompt(np.full(8, 0.3), TASK)


class Plan:
    """Answers that depend on how far a prompt is from the first one in a fixed direction."""

    def __init__(self, start: NDArray[np.float32], answer: Callable[[float, int], str]) -> None:
        self.start = start
        self.answer = answer
        self.direction = np.random.default_rng(1).standard_normal(start.shape)

    def generate(
        self,
        embeds: ArrayLike,
        indices: ArrayLike | None = None,
        _sampling: Sampling | None = None,
        *,
        max_tokens: int = 64,
        stop: Sequence[str] = (),
    ) -> list[list[Answer]]:
        assert max_tokens == 48
        assert stop == ("\n",)
        moved = [float(((rows - self.start) * self.direction).sum()) for rows in np.asarray(embeds)]
        none = np.zeros(0, dtype=np.int32)
        return [[Answer(self.answer(far, int(i)), none) for i in np.asarray(indices)] for far in moved]


def run(monkeypatch: pytest.MonkeyPatch, prompt: Prompt, answer: Callable[[float, int], str], **options: Any) -> Any:
    monkeypatch.setattr(refining, "compile_answers", lambda *_args: Plan(prompt.rows, answer))
    given: dict[str, Any] = {"metric": "contains", "budget": Budget(evaluations=240), **options}
    return refining.refine(ToyScorer(), TASK, ROWS, prompt, **given)


def rising(far: float, number: int) -> str:
    """Right for the more texts the farther the prompt has moved."""
    return f"target {number}" if far > 0.2 * (number % 10 - 5) else f"wrong {number}"


def test_it_finds_a_prompt_whose_answers_are_worth_more(monkeypatch: pytest.MonkeyPatch, prompt: Prompt) -> None:
    found = run(monkeypatch, prompt, rising)
    assert found.after > found.before + 0.1
    assert found.after == max(mean for _, mean in found.curve)
    assert found.prompt != prompt
    assert found.prompt.spec == prompt.spec
    assert found.prompt.history[-1]["after"] == found.after
    assert found.evaluations == 240


def test_the_same_answer_to_every_text_is_refused_though_it_is_worth_more(
    monkeypatch: pytest.MonkeyPatch, prompt: Prompt
) -> None:
    found = run(
        monkeypatch, prompt, lambda far, number: "same" if far > 0.3 else f"other {number}", metric="max-words:1"
    )
    assert max(mean for _, mean in found.curve) > found.before
    assert found.prompt == prompt
    assert found.after == found.before


def test_where_all_answers_are_worth_the_same_the_prompt_stays(monkeypatch: pytest.MonkeyPatch, prompt: Prompt) -> None:
    found = run(monkeypatch, prompt, lambda _far, number: f"target {number}", budget=Budget(evaluations=48))
    assert {mean for _, mean in found.curve} == {1.0}
    assert found.prompt == prompt


def test_an_interrupted_search_returns_the_best_so_far(monkeypatch: pytest.MonkeyPatch, prompt: Prompt) -> None:
    def stop(evaluations: int, _mean: float) -> None:
        if evaluations >= 96:
            raise KeyboardInterrupt

    found = run(monkeypatch, prompt, rising, on_measured=stop)
    assert found.evaluations == 96
    assert found.after > found.before


def test_failures_of_a_metric_are_counted(monkeypatch: pytest.MonkeyPatch, prompt: Prompt) -> None:
    def broken(_text: str, _answer: str, _row: object) -> float:
        raise ValueError("no")

    found = run(monkeypatch, prompt, rising, metric=broken, budget=Budget(evaluations=12))
    assert found.n_failed == 12 * 16 + 2 * 10  # of the candidates' mini-batch, and of the held-back rows twice
    assert found.prompt == prompt


def test_answers_that_the_metric_fails_on_are_not_the_best_of_negative_ones(
    monkeypatch: pytest.MonkeyPatch, prompt: Prompt
) -> None:
    def negative(_text: str, answer: str, _row: object) -> float:
        return 1 / 0 if answer == "broken" else -1.0

    def breaks(far: float, number: int) -> str:
        return "broken" if far > 0.2 else f"fine {number}"

    found = run(monkeypatch, prompt, breaks, metric=negative)
    assert found.n_failed > 0
    assert found.after == found.before == -1.0
    assert found.prompt == prompt


def test_a_prompt_that_the_metric_failed_on_can_be_refined(monkeypatch: pytest.MonkeyPatch, prompt: Prompt) -> None:
    def measure(_text: str, answer: str, _row: object) -> float:
        return 1 / 0 if answer == "broken" else 1.0

    def mends(far: float, number: int) -> str:
        return f"fine {number}" if far > 0.2 else "broken"

    found = run(monkeypatch, prompt, mends, metric=measure)
    assert (found.before, found.after) == (-math.inf, 1.0)
    assert found.prompt.history[-1]["before"] is None


def test_a_prompt_that_does_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = Objective(ToyScorer(), TASK.templates[0], (), ROWS[:1], SPEC, PromptSpec(d=8))
    with raises(PromptError, field="prompt"):
        run(monkeypatch, objective.as_prompt(np.zeros(8), TASK), rising)
