"""Metrics of a generated text: how good an answer is, as a number that is higher for a better one.

A metric is any function of (text, answer, row) that returns a finite number; `row` is (text, target text). Those with a
name return 0 to 1, and are given as ``name`` or ``name:argument``, see `NAMED`.
"""

from __future__ import annotations

import json
import logging
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedbpt.errors import ConfigError, MissingExtraError

log = logging.getLogger(__name__)

TargetRow: TypeAlias = tuple[str, Any]
"""(text, target text)."""

Metric: TypeAlias = Callable[[str, str, TargetRow], float]


class Rewards(NamedTuple):
    """The metric's value [n] of each answer. ``n_failed``: answers whose value is 0 because the metric raised an error
    or returned no finite number.
    """

    values: NDArray[np.float64]
    n_failed: int


def rewards_of(metric: Metric, rows: Sequence[TargetRow], answers: Sequence[str]) -> Rewards:
    """Measure an answer to each row's text."""
    values = np.zeros(len(answers))
    n_failed = 0
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        try:
            value = float(metric(row[0], answer, row))
        except Exception as error:  # noqa: BLE001 - of a person's own function; it is counted and shown
            log.debug("the metric raised %s on row %d", type(error).__name__, i)
            value = math.nan
        if math.isfinite(value):
            values[i] = value
        else:
            n_failed += 1
    return Rewards(values, n_failed)


@lru_cache(maxsize=64)
def metric_named(name: str) -> Metric:
    """The metric of `NAMED` that ``name`` or ``name:argument`` gives.

    Raises:
        ConfigError: there is none of this name, or its argument is missing or invalid.
        MissingExtraError: its library is not installed.
    """
    kind, colon, argument = name.partition(":")
    make = NAMED.get(kind)
    if make is None:
        raise ConfigError(f"there is no metric {kind!r}: give one of {', '.join(sorted(NAMED))}", field="metric")
    if bool(colon) != (kind in _WITH_ARGUMENT):
        example = _WITH_ARGUMENT.get(kind)
        problem = (
            f"metric {kind!r} takes no argument: leave it out"
            if example is None
            else (f"metric {kind!r} needs an argument: for example {example!r}")
        )
        raise ConfigError(problem, field="metric")
    return make(argument)


def _exact_match(_argument: str) -> Metric:
    return lambda _text, answer, row: float(answer.strip() == _target(row).strip())


def _contains(_argument: str) -> Metric:
    def contains(_text: str, answer: str, row: TargetRow) -> float:
        return float(_target(row).strip().casefold() in answer.casefold())

    return contains


def _token_f1(_argument: str) -> Metric:
    def token_f1(_text: str, answer: str, row: TargetRow) -> float:
        given, wanted = _words(answer), _words(_target(row))
        same = sum((Counter(given) & Counter(wanted)).values())
        return 2 * same / (len(given) + len(wanted)) if same else 0.0

    return token_f1


_ARTICLES: Final = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)


def _words(text: str) -> list[str]:
    """As SQuAD's evaluation (Rajpurkar et al. 2016) normalises answers: no case, punctuation or English articles."""
    return _ARTICLES.sub(" ", text.casefold().translate(_WITHOUT_PUNCTUATION)).split()


class _UnicodeWords:
    """A tokenizer for ``rouge-score``, whose own drops all letters but English ones."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.casefold())


def _rouge_l(_argument: str) -> Metric:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingExtraError("the metric 'rouge-l'", "metrics") from error
    scorer = RougeScorer(["rougeL"], tokenizer=_UnicodeWords())

    def rouge_l(_text: str, answer: str, row: TargetRow) -> float:
        return float(scorer.score(_target(row), answer)["rougeL"].fmeasure)

    return rouge_l


def _bleu(_argument: str) -> Metric:
    try:
        from sacrebleu import sentence_bleu
    except ImportError as error:
        raise MissingExtraError("the metric 'bleu'", "metrics") from error
    return lambda _text, answer, row: min(sentence_bleu(answer, [_target(row)]).score / 100, 1.0)


def _regex(pattern: str) -> Metric:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"the pattern of metric 'regex' is invalid ({error}): correct it", field="metric") from error
    return lambda _text, answer, _row: float(compiled.search(answer) is not None)


def _json_schema(schema: str) -> Metric:
    try:
        from jsonschema.exceptions import SchemaError, ValidationError
        from jsonschema.validators import validator_for
    except ImportError as error:
        raise MissingExtraError("the metric 'json-schema'", "metrics") from error
    try:
        parsed = json.loads(schema)
        kind = validator_for(parsed)
        kind.check_schema(parsed)
    except (ValueError, SchemaError, RecursionError) as error:
        first = str(error).split("\n")[0]
        raise ConfigError(f"the schema of 'json-schema' is invalid ({first}): correct it", field="metric") from error
    validator = kind(parsed)

    def json_schema(_text: str, answer: str, _row: TargetRow) -> float:
        try:
            validator.validate(json.loads(answer))
        except (ValueError, ValidationError, RecursionError):
            return 0.0
        return 1.0

    return json_schema


def _json_fields(_argument: str) -> Metric:
    def json_fields(_text: str, answer: str, row: TargetRow) -> float:
        wanted = json.loads(_target(row))  # a target that is no JSON object fails, and is counted
        if not isinstance(wanted, dict):
            raise TypeError("the target is not a JSON object")
        try:
            given = json.loads(answer)
        except (ValueError, RecursionError):
            return 0.0
        if not isinstance(given, dict):
            return 0.0
        right = sum(1 for key, value in wanted.items() if key in given and given[key] == value)
        return right / max(len(wanted), len(given), 1)

    return json_fields


def _max_words(limit: str) -> Metric:
    if not (limit.isascii() and limit.isdigit() and int(limit) > 0):
        raise ConfigError(f"metric 'max-words' needs a number of words, got {limit!r}: give 1 or more", field="metric")
    most = int(limit)

    def max_words(_text: str, answer: str, _row: TargetRow) -> float:
        n = len(answer.split())
        return min(1.0, max(0.0, 2.0 - n / most)) if n else 0.0

    return max_words


NAMED: Final[Mapping[str, Callable[[str], Metric]]] = {
    "exact-match": _exact_match,
    "contains": _contains,
    "token-f1": _token_f1,
    "rouge-l": _rouge_l,
    "bleu": _bleu,
    "regex": _regex,
    "json-schema": _json_schema,
    "json-fields": _json_fields,
    "max-words": _max_words,
}
"""The named metrics.

``exact-match``: the answer is the target, but for white space around them. ``contains``: the target is in the answer,
whatever the case. ``token-f1``: F1 of the words, as in SQuAD. ``rouge-l``: F1 of the longest common subsequence of
words. ``bleu``: sentence BLEU of ``sacrebleu``. ``regex:PATTERN``: it is found in the answer. ``json-schema:SCHEMA``:
the answer is JSON that the schema allows. ``json-fields``: number of the target's JSON fields that the answer has, over
the fields of the one with more. ``max-words:N``: 1 for 1 to N words, falling to 0 at 2 N.
"""

_WITH_ARGUMENT: Final = {
    "regex": r"regex:^[A-Z].*\.$",
    "json-schema": 'json-schema:{"type": "object"}',
    "max-words": "max-words:12",
}


def _target(row: TargetRow) -> str:
    return str(row[1])
