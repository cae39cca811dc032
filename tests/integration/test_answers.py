"""Answers of a real model, measured beside what a person would try first, and tuned on a metric."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

import fedbpt
from fedbpt.answering import LINES, AnswerComparison, AnswerLine, best_constant
from fedbpt.errors import ConfigError, DataError, InputError, PromptError
from fedbpt.metrics import metric_named
from fedbpt.tasks import Generation, Task, Template
from tests.support.raises import raises

pytestmark = pytest.mark.slow

CAPITALS = [
    *[("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Japan", "Tokyo"), ("Egypt", "Cairo")],
    *[("Greece", "Athens"), ("Cuba", "Havana"), ("Peru", "Lima"), ("Kenya", "Nairobi"), ("Norway", "Oslo")],
    *[("Austria", "Vienna"), ("Portugal", "Lisbon"), ("Poland", "Warsaw"), ("Russia", "Moscow"), ("China", "Beijing")],
    *[
        ("Hungary", "Budapest"),
        ("Ireland", "Dublin"),
        ("Germany", "Berlin"),
        ("Sweden", "Stockholm"),
        ("Chile", "Santiago"),
    ],
]
TASK = Task(
    name="capitals",
    templates=(Template(pattern="The capital of {text}?\nA:", label_words=()),),
    generation=Generation(metric="exact-match", max_tokens=8),
)


@pytest.fixture(scope="module")
def scorer() -> fedbpt.NativeScorer:
    fedbpt.models.pull("smollm2-135m")
    return fedbpt.load_model("smollm2-135m")


@pytest.fixture(scope="module")
def tuned(scorer: fedbpt.NativeScorer) -> fedbpt.Prompt:
    """A prompt that moves answers, whatever it is worth."""
    place = fedbpt.PromptSpec(placement="layers", d=20, alpha=0.05)
    result = fedbpt.tune(scorer, TASK, CAPITALS[:12], budget=fedbpt.Budget(evaluations=40), prompt=place, show=False)
    prompt = fedbpt.api.make_prompt(scorer, TASK, result.run)
    if prompt.spec.placement == "layers":
        return prompt
    drawn = np.random.default_rng(0).standard_normal(prompt.rows.shape) * 0.02 + prompt.rows
    fields = ("spec", "task_name", "labels", "template", "model_fingerprint", "model_name", "architecture", "task")
    return fedbpt.Prompt(rows=drawn.astype(np.float32), **{name: getattr(prompt, name) for name in fields})


def test_answers_end_at_the_stop_string_and_follow_examples(scorer: fedbpt.NativeScorer) -> None:
    plain = fedbpt.answers(scorer, TASK, CAPITALS[3:6])
    shown = fedbpt.answers(scorer, TASK, CAPITALS[3:6], examples=CAPITALS[:3])
    assert len(plain) == 3
    assert not any("\n" in answer for answer in plain + shown)
    assert sum(answer == target for answer, (_, target) in zip(shown, CAPITALS[3:6], strict=True)) >= 2
    assert fedbpt.answers(scorer, TASK, CAPITALS[4:5]) == plain[1:2]


def test_a_comparison_has_the_lines_that_a_person_would_try(scorer: fedbpt.NativeScorer, tuned: fedbpt.Prompt) -> None:
    found = fedbpt.compare_answers(scorer, TASK, CAPITALS[12:], tuned, CAPITALS[:12])
    assert list(found.lines) == ["zero_shot", "examples", "constant", "tuned"]
    assert found.lines["examples"].mean > found.lines["zero_shot"].mean + 0.3
    assert found.n_examples == 3
    assert found.lines["constant"].distinct == 1 / len(CAPITALS[12:])
    assert found.lines["examples"].distinct > 0.5
    low, high = found.gain("examples")
    assert low <= found.lines["tuned"].mean - found.lines["examples"].mean <= high
    assert {"text", "target", *found.lines} == set(found.side_by_side(2)[0])
    assert "exact-match" in found._repr_html_()


def test_a_function_measures_too_and_its_errors_are_counted(scorer: fedbpt.NativeScorer) -> None:
    def short(text: str, answer: str, row: tuple[str, str]) -> float:
        if row[0] == "Peru":
            raise ValueError("no")
        return float(len(answer) < 10 and text == row[0])

    found = fedbpt.compare_answers(scorer, TASK, CAPITALS[6:9], metric=short)
    assert list(found.lines) == ["zero_shot"]
    assert (found.metric, found.lines["zero_shot"].n_failed) == ("short", 1)
    assert found.verdict() == "no prompt was measured"


def test_texts_without_answers_get_the_best_of_several(scorer: fedbpt.NativeScorer) -> None:
    texts = [text for text, _ in CAPITALS[3:]]
    seen: set[tuple[str, str]] = set()

    def one_word(text: str, answer: str, row: tuple[str, str]) -> float:
        seen.add((text, answer))
        assert row == (text, "")
        return 1.0 / len(answer.split()) if answer else 0.0

    found = fedbpt.sample_targets(scorer, TASK, texts, CAPITALS[:3], metric=one_word, n_samples=4, least=0.9)
    assert found.n_texts == len(texts)
    assert len(seen) > len(texts)  # samples differ
    assert set(found.rows) <= seen
    assert all(len(answer.split()) == 1 for _, answer in found.rows)
    assert found.first <= found.best
    assert len(found.rows) == sum(any(t == text and len(a.split()) == 1 for t, a in seen) for text in texts)
    again = fedbpt.sample_targets(scorer, TASK, texts, CAPITALS[:3], metric=one_word, n_samples=4, least=0.9)
    assert again == found
    likeliest = fedbpt.sample_targets(scorer, TASK, texts, CAPITALS[:3], metric=one_word, n_samples=1, least=0.0)
    assert likeliest.first == likeliest.best == found.first


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"texts": []}, "texts"),
        ({"texts": ["Peru", " "]}, "texts"),
        ({"examples": []}, "examples"),
        ({"least": 1.5}, "least"),
        ({"examples": [("word " * 9000, "x")]}, "examples"),
    ],
)
def test_targets_that_cannot_be_sampled_are_refused(
    scorer: fedbpt.NativeScorer, changed: dict[str, object], field: str
) -> None:
    long = msgspec.structs.replace(TASK, max_text_tokens=9000)
    given = {"texts": ["Peru"], "examples": CAPITALS[:2], "metric": "max-words:9", "n_samples": 1, **changed}
    with raises(DataError, field=field):
        fedbpt.sample_targets(scorer, long if field == "examples" else TASK, **given)  # type: ignore[arg-type]


def comparison(**rewards: list[float]) -> AnswerComparison:
    """A comparison in which each line has these rewards."""
    n = len(next(iter(rewards.values())))
    answers = tuple(map(str, range(n)))
    lines = {name: AnswerLine(answers, np.array(values, dtype=float), 0) for name, values in rewards.items()}
    return AnswerComparison("exact-match", tuple(("t", "x") for _ in range(n)), lines)


def test_improved_is_said_only_where_all_others_are_beaten_beyond_the_interval() -> None:
    low, high = [0.0, 0.2] * 10, [0.9, 1.0] * 10
    best = comparison(zero_shot=low, examples=low, constant=low, tuned=high)
    assert best.improved
    assert best.verdict().startswith("improved")
    for name in ("zero_shot", "examples", "constant"):
        lines = dict.fromkeys(("zero_shot", "examples", "constant"), low) | {name: high}
        found = comparison(**lines, tuned=high)
        assert not found.improved
        assert found.verdict() == f"not improved: not shown to be better than {LINES[name]}"
    noisy = comparison(zero_shot=low, examples=[0.0, 1.0] * 10, constant=low, tuned=[1.0, 0.2] * 10)
    assert noisy.lines["tuned"].mean > noisy.lines["examples"].mean
    assert not noisy.improved
    few = comparison(zero_shot=[0, 0, 0], examples=[0, 0, 0], constant=[0, 0, 0], tuned=[1, 1, 1])
    assert not few.improved
    assert few.lines["tuned"].interval == (-np.inf, np.inf)
    assert few.table()[-1] == ("tuned", "1.000, 100% distinct")
    ten = comparison(tuned=[0.0, 1.0] * 5).lines["tuned"]  # by Student's t of 9 degrees of freedom
    np.testing.assert_allclose(
        ten.interval, (0.5 - 2.262 * 0.5270 / 10**0.5, 0.5 + 2.262 * 0.5270 / 10**0.5), atol=0.01
    )
    half = comparison(zero_shot=low, tuned=high)
    assert not half.improved
    assert half.verdict().startswith("better than untuned; give training rows")


def test_the_best_constant_answer_is_the_targets_own() -> None:
    rows = [("a", "yes"), ("b", "no"), ("c", "no"), ("d", "it is not so")]
    assert best_constant(metric_named("exact-match"), rows) == "no"
    assert best_constant(metric_named("contains"), rows) == "it is not so"  # holds " not", and "no" with it


def test_refining_keeps_a_prompt_only_if_held_back_rows_prefer_it(
    scorer: fedbpt.NativeScorer, tuned: fedbpt.Prompt
) -> None:
    measured: list[tuple[int, float]] = []
    budget = fedbpt.Budget(evaluations=24)
    found = fedbpt.refine(
        scorer, TASK, CAPITALS, tuned, metric="max-words:2", budget=budget, popsize=6, batch_size=4,
        on_measured=lambda evaluations, mean: measured.append((evaluations, mean)),
    )  # fmt: skip
    assert found.evaluations == 24
    assert list(found.curve[1:]) == measured
    assert found.after >= found.before == found.curve[0][1]
    assert (found.prompt == tuned) == (found.after == found.before)
    again = fedbpt.refine(scorer, TASK, CAPITALS, tuned, metric="max-words:2", budget=budget, popsize=6, batch_size=4)
    assert (again.prompt, again.curve) == (found.prompt, found.curve)


def test_wrong_arguments_are_refused(scorer: fedbpt.NativeScorer, tuned: fedbpt.Prompt) -> None:
    labelled = Task(name="x", labels=("a", "b"), templates=(Template(pattern="{text}\nA:", label_words=(" a", " b")),))
    with raises(ConfigError, field="task"):
        fedbpt.answers(scorer, labelled, [("t", 0)])
    with raises(ConfigError, field="metric"):
        fedbpt.compare_answers(scorer, TASK, CAPITALS[:2], metric="best")
    with raises(DataError, field="train"):
        fedbpt.refine(scorer, TASK, CAPITALS[:4], tuned)
    with raises(InputError, field="n_examples"):
        fedbpt.compare_answers(scorer, TASK, CAPITALS[:2], n_examples=0)
    with raises(ConfigError, field="budget"):
        fedbpt.refine(scorer, TASK, CAPITALS, tuned, budget=fedbpt.Budget(tokens=100))
    fields = ("task_name", "labels", "template", "model_fingerprint", "model_name", "architecture", "task")
    same = {name: getattr(tuned, name) for name in fields}
    front = fedbpt.Prompt(
        rows=np.ones((2, scorer.n_embd)), spec=fedbpt.PromptSpec(placement="front", n_prompt=2), **same
    )
    with raises(InputError, field="prompt"):
        fedbpt.answers(scorer, TASK, CAPITALS[:1], front)
    nothing = fedbpt.Prompt(rows=np.zeros_like(tuned.rows), spec=tuned.spec, **same)
    with raises(PromptError, field="prompt"):
        fedbpt.refine(scorer, TASK, CAPITALS, nothing)


def test_the_command_line_shows_the_comparison(tmp_path: Path, tuned: fedbpt.Prompt) -> None:
    prompt = tuned.save(tmp_path / "p.safetensors")
    for name, rows in (("train", CAPITALS[:12]), ("test", CAPITALS[12:])):
        lines = [json.dumps({"text": text, "label": target}) for text, target in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    data = ["--data", str(tmp_path / "test.jsonl"), "--train", str(tmp_path / "train.jsonl")]
    command = [sys.executable, "-m", "fedbpt", "evaluate", str(prompt), *data]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "best constant answer" in shown
    assert "improved" in shown
    found = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert found["metric"] == "exact-match"
    assert list(found["lines"]) == ["zero_shot", "examples", "constant", "tuned"]
    assert len(found["lines"]["examples"]["answers"]) == 8
