"""Metrics of generated text."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbpt.errors import ConfigError, MissingExtraError
from fedbpt.metrics import NAMED, allow_metric, filled, metric_named, rewards_of
from tests.support.raises import raises

SCHEMA = '{"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}'
EXAMPLES = {"regex": "regex:^a", "json-schema": f"json-schema:{SCHEMA}", "max-words": "max-words:3"}


def value(name: str, answer: str, target: str = "") -> float:
    rewards = rewards_of(metric_named(name), [("a text", target)], [answer])
    assert rewards.n_failed == 0
    return float(rewards.values[0])


@pytest.mark.parametrize(
    ("name", "answer", "target", "expected"),
    [
        ("exact-match", " Paris\n", "Paris", 1),
        ("exact-match", "paris", "Paris", 0),
        ("contains", "It is in PARIS.", "Paris", 1),
        ("contains", "It is in Rome.", "Paris", 0),
        ("token-f1", "the city of Paris", "Paris, the city!", 2 * 2 / (3 + 2)),
        ("token-f1", "Rome", "Paris", 0),
        ("token-f1", "", "Paris", 0),
        ("rouge-l", "a b c d", "a c d e", 0.75),
        ("rouge-l", "новости дня", "новости дня", 1),
        ("rouge-l", "", "x", 0),
        ("rouge-l", "\u0915\u0940", "\u0915\u093e", 0),  # Hindi words that differ in a vowel sign
        ("rouge-l", "\u6211\u559c\u6b22\u82f9\u679c", "\u6211\u559c\u6b22\u9999\u8549", 0.6),  # Chinese
        ("token-f1", "\u5df4\u9ece\u3002", "\u5df4\u9ece", 1),
        ("token-f1", "A.", "A", 1),
        ("exact-match", "Cafe\u0301", "Caf\u00e9", 1),
        ("bleu", "the cat sat on the mat", "the cat sat on the mat", 1),
        ("bleu", "", "x", 0),
        ("regex:^[A-Z].*\\.$", "Yes, it is.", "", 1),
        ("regex:^[A-Z].*\\.$", "yes", "", 0),
        (f"json-schema:{SCHEMA}", '{"n": 3}', "", 1),
        (f"json-schema:{SCHEMA}", '{"n": "3"}', "", 0),
        (f"json-schema:{SCHEMA}", "n = 3", "", 0),
        (f"json-schema:{SCHEMA}", "[" * 100_000, "", 0),
        ("json-fields", '{"a": 1, "b": "x"}', '{"a": 1, "b": "x"}', 1),
        ("json-fields", '{"a": 1}', '{"a": 1, "b": "x"}', 0.5),
        ("json-fields", '{"a": 1, "b": 2, "c": 3}', '{"a": 1}', 1 / 3),
        ("json-fields", '{"a": 1', '{"a": 1}', 0),
        ("json-fields", "[1]", '{"a": 1}', 0),
        ("json-fields", '{"a": true}', '{"a": 1}', 0),
        ("json-fields", "{}", "{}", 1),
        ("json-schema:{}", "NaN", "", 0),
        ("max-words:3", "one two three", "", 1),
        ("max-words:4", "one two three four five", "", 0.75),
        ("max-words:2", "one two three four five", "", 0),
        ("max-words:2", "", "", 0),
    ],
)
def test_a_named_metric_measures(name: str, answer: str, target: str, expected: float) -> None:
    assert value(name, answer, target) == pytest.approx(expected)


@settings(deadline=None)  # the first use of a metric imports its library
@given(st.text(max_size=40), st.text(min_size=1, max_size=40))
def test_named_metrics_are_between_0_and_1(answer: str, target: str) -> None:
    for kind in NAMED:
        wanted = json.dumps({"a": target}) if kind == "json-fields" else target
        assert 0 <= value(EXAMPLES.get(kind, kind), answer, wanted) <= 1


@settings(deadline=None)
@given(st.text(alphabet=st.characters(categories=["L", "N"]), min_size=1, max_size=40))
def test_the_target_itself_is_the_best_answer(target: str) -> None:
    for kind in ("exact-match", "contains", "rouge-l"):
        assert value(kind, target, target) == pytest.approx(1)


def test_what_a_function_raises_or_returns_wrongly_counts_as_0_and_is_counted() -> None:
    def strange(_text: str, answer: str, _row: object) -> float:
        if answer == "raise":
            raise RuntimeError("secret")
        return {"nan": float("nan"), "none": None, "inf": float("inf")}.get(answer, 0.25)  # type: ignore[return-value]

    answers = ["raise", "nan", "none", "inf", "fine"]
    rewards = rewards_of(strange, [("t", "x")] * 5, answers)
    np.testing.assert_array_equal(filled(rewards.values), [0, 0, 0, 0, 0.25])
    assert rewards.n_failed == 4


def test_where_a_function_has_negative_values_a_failure_is_not_the_best() -> None:
    def minus_length(_text: str, answer: str, _row: object) -> float:
        return 1 / 0 if answer == "fail" else -float(len(answer))

    rewards = rewards_of(minus_length, [("t", "x")] * 3, ["a", "fail", "abc"])
    np.testing.assert_array_equal(filled(rewards.values), [-1, -3, -3])
    several = np.array([[-1.0, np.nan], [-5.0, -2.0]])
    np.testing.assert_array_equal(filled(several), [[-1, -5], [-5, -2]])


@pytest.mark.parametrize(
    ("answer", "target", "value"),
    [
        ("1000", "1,000", 1.0),
        ("US", "U.S.", 1.0),
        ("5 million", "$5 million", 1.0),
        ("dont know", "don't know", 1.0),
        ("well-known", "well known", 0.0),
        ("1990–2000", "1990 2000", 1.0),  # beyond ASCII: words
    ],
)
def test_words_are_those_of_squads_evaluation(answer: str, target: str, value: float) -> None:
    assert rewards_of(metric_named("token-f1"), [("t", target)], [answer]).values == [value]


@pytest.mark.parametrize(
    ("answer", "value"), [('{"p": 10}', 1.0), ('{"p": 10.0}', 1.0), ('{"p": true}', 0.0), ('{"p": 10.5}', 0.0)]
)
def test_equal_numbers_are_equal_however_written(answer: str, value: float) -> None:
    assert rewards_of(metric_named("json-fields"), [("t", '{"p": 10}')], [answer]).values == [value]


def test_a_schema_makes_this_machine_read_nothing(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text("{}")
    with raises(ConfigError, field="metric"):
        metric_named(f'json-schema:{{"$ref": "file://{tmp_path}/s.json"}}')


def test_a_target_that_is_no_json_is_counted() -> None:
    assert rewards_of(metric_named("json-fields"), [("t", "x"), ("t", "[1]")], ["{}", "{}"]).n_failed == 2


@pytest.mark.parametrize(
    "name",
    [
        "exact",
        "regex",
        "regex:(",
        "json-schema:3",
        'json-schema:{"$schema": 3}',
        f"max-words:{10**9}",
        "max-words:0",
        "max-words:many",
        "json-schema:{",
        "exact-match:3",
        "",
    ],
)
def test_a_wrong_name_or_argument_is_refused_in_one_line(name: str) -> None:
    with raises(ConfigError, field="metric") as caught:
        metric_named(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("rouge-l", "rouge_score.rouge_scorer"),
        ("bleu", "sacrebleu"),
        (f"json-schema:{SCHEMA}", "jsonschema.exceptions"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, name: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    metric_named.cache_clear()
    with pytest.raises(MissingExtraError, match=r"fedbpt\[metrics\]"):
        metric_named(name)


def shortest(_text: str, answer: str, _row: object) -> float:
    """1 for one character, less for more."""
    return 1 / len(answer)


def test_a_function_is_used_only_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedbpt.metrics._allowed", {})
    name = f"{__name__}:shortest"
    with raises(ConfigError, field="metric") as caught:
        metric_named(name)
    assert f"--allow-metric {name}" in str(caught.value)
    allow_metric(name)
    assert value(name, "abcd") == 0.25


@pytest.mark.parametrize(
    "name", ["shortest", "exact-match", "regex:a", "no_such_module:f", "math:no_such", "math:pi", "a b:c", ":f", "m:"]
)
def test_what_is_no_function_cannot_be_allowed(name: str) -> None:
    with raises(ConfigError, field="name") as caught:
        allow_metric(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("code", ["def f(:", "raise SystemError('no\\nway')", "1 / 0"])
def test_a_module_that_cannot_be_imported_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_metric_module.py").write_text(code)
    with raises(ConfigError, field="name") as caught:
        allow_metric("own_metric_module:f")
    assert "\n" not in str(caught.value)
