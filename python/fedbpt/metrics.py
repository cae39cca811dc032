"""Metrics of a generated text: how good an answer is, as a number that is higher for a better one.

A metric is any function of (text, answer, row) that returns a finite number; `row` is (text, target text). Those with a
name return 0 to 1, and are given as ``name`` or ``name:argument``, see `NAMED`. They compare text in Unicode's composed
form (NFC).
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedbpt.argument_types import checked
from fedbpt.errors import ConfigError, MissingExtraError
from fedbpt.plain_text import one_line

log = logging.getLogger(__name__)

TargetRow: TypeAlias = tuple[str, Any]
"""(text, target text)."""

Metric: TypeAlias = Callable[[str, str, TargetRow], float]


class Rewards(NamedTuple):
    """The metric's value [n] of each answer; NaN where it raised an error or returned no finite number, see `filled`.

    ``n_failed``: number of these.
    """

    values: NDArray[np.float64]
    n_failed: int


def rewards_of(metric: Metric, rows: Sequence[TargetRow], answers: Sequence[str]) -> Rewards:
    """Measure an answer to each row's text."""
    values = np.full(len(answers), math.nan)
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        try:
            value = float(metric(row[0], answer, row))
        except Exception as error:  # noqa: BLE001 - of a person's own function; it is counted and shown
            log.debug("the metric raised %s on row %d", type(error).__name__, i)
            value = math.nan
        values[i] = value if math.isfinite(value) else math.nan
    return Rewards(values, int(np.isnan(values).sum()))


def filled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """``values`` of answers that are compared, of any shape; failures count 0, or as the worst if that is negative."""
    failed = np.isnan(values)
    return np.where(failed, min(0.0, values[~failed].min(initial=0.0)), values)


@lru_cache(maxsize=64)
def metric_named(name: str) -> Metric:
    """The metric of `NAMED` that ``name`` or ``name:argument`` gives, or the allowed function ``module:function``.

    Raises:
        ConfigError: there is none of this name, `allow_metric` has not allowed it, or its argument is missing or
            invalid.
        MissingExtraError: its library is not installed.
    """
    check_metric(name)
    kind, _, argument = name.partition(":")
    if kind in NAMED:
        return NAMED[kind](argument)
    if name not in _allowed:
        raise ConfigError(
            f"the metric {name} is a function that is not allowed here: check what it does, then give --allow-metric "
            f"{name} (in Python: fedbpt.metrics.allow_metric({name!r}))",
            field="metric",
        )
    return _allowed[name]


@checked
def allow_metric(name: str) -> None:
    """Let tasks name a function as their metric, in this process.

    A task may come from another machine, so what it names is run only if the owner of this one has allowed it. A
    function takes (text, answer, row) and returns 0 (worst) to 1; see `fedbpt.compare_answers`.

    Args:
        name: ``package.module:function``, which is imported now.

    Raises:
        ConfigError: it is not a name of this form, or cannot be imported.
    """
    module, _, function = name.partition(":")
    if not _FUNCTION.fullmatch(name) or module in NAMED:
        raise ConfigError(f"{name!r} does not name a function: give package.module:function", field="name")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever a person's own module raises
        raise ConfigError(
            f"the metric {name} cannot be imported ({one_line(f'{type(error).__name__}: {error}', 200)}): install its "
            "package, or set PYTHONPATH to its folder",
            field="name",
        ) from error
    if not callable(found):
        raise ConfigError(f"the metric {name} is no function: name one", field="name")
    _allowed[name] = found


def check_metric(name: str) -> None:
    """Raise `ConfigError` unless this may name a metric: one of `NAMED`, with an argument if it needs one, or
    ``module:function``.
    """
    kind, colon, _ = name.partition(":")
    if kind not in NAMED and _FUNCTION.fullmatch(name):
        return
    if kind not in NAMED:
        raise ConfigError(
            f"there is no metric {kind!r}: give one of {', '.join(sorted(NAMED))}, or package.module:function",
            field="metric",
        )
    if bool(colon) != (kind in _WITH_ARGUMENT):
        example = _WITH_ARGUMENT.get(kind)
        remedy = "takes no argument: leave it out" if example is None else f"needs an argument: for example {example!r}"
        raise ConfigError(f"metric {kind!r} {remedy}", field="metric")


def _exact_match(_argument: str) -> Metric:
    return lambda _text, answer, row: float(_composed(answer).strip() == _target(row).strip())


def _contains(_argument: str) -> Metric:
    def contains(_text: str, answer: str, row: TargetRow) -> float:
        return float(_target(row).strip().casefold() in _composed(answer).casefold())

    return contains


def _token_f1(_argument: str) -> Metric:
    def token_f1(_text: str, answer: str, row: TargetRow) -> float:
        given, wanted = _words(answer), _words(_target(row))
        if not given or not wanted:  # a target like "A"
            given, wanted = _words(answer, articles=True), _words(_target(row), articles=True)
        same = sum((Counter(given) & Counter(wanted)).values())
        return 2 * same / (len(given) + len(wanted)) if same else 0.0

    return token_f1


_NO_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)

_ARTICLES: Final = re.compile(r"\b(a|an|the)\b")


def _words(text: str, articles: bool = False) -> list[str]:
    """As SQuAD's evaluation (Rajpurkar et al. 2016) normalises answers: no case, punctuation or English articles.

    Punctuation beyond ASCII, which it keeps, separates words.
    """
    ascii_free = _composed(text).casefold().translate(_NO_PUNCTUATION)
    plain = "".join(" " if unicodedata.category(c).startswith("P") else c for c in ascii_free)
    kept = plain if articles else _ARTICLES.sub(" ", plain)
    return _SCRIPTIO_CONTINUA.sub(r" \1 ", kept).split()


_SCRIPTIO_CONTINUA: Final = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
"""A character of Chinese or Japanese, which are written without spaces: each counts as a word."""


class _UnicodeWords:
    """A tokenizer for ``rouge-score``, whose own drops all letters but English ones."""

    def tokenize(self, text: str) -> list[str]:
        kept = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in _composed(text).casefold())
        return _SCRIPTIO_CONTINUA.sub(r" \1 ", kept).split()


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
        from referencing import Registry
        from referencing.exceptions import Unresolvable
    except ImportError as error:
        raise MissingExtraError("the metric 'json-schema'", "metrics") from error
    try:
        parsed = json.loads(schema)
        if not isinstance(parsed, dict) or not isinstance(parsed.get("$schema", ""), str):
            raise ValueError("it must be an object, its $schema a string")
        kind = validator_for(parsed)
        kind.check_schema(parsed)
        validator = kind(parsed, registry=Registry())  # of nothing: a schema must not make this machine read files
        validator.is_valid({})
    except (ValueError, SchemaError, Unresolvable, RecursionError) as error:
        first = str(error).split("\n")[0]
        raise ConfigError(f"the schema of 'json-schema' is invalid ({first}): correct it", field="metric") from error

    def json_schema(_text: str, answer: str, _row: TargetRow) -> float:
        try:
            validator.validate(_parsed(answer))
        except (ValueError, ValidationError, RecursionError):
            return 0.0
        return 1.0

    return json_schema


def _json_fields(_argument: str) -> Metric:
    def json_fields(_text: str, answer: str, row: TargetRow) -> float:
        wanted = _parsed(_target(row))  # a target that is no JSON object fails, and is counted
        if not isinstance(wanted, dict):
            raise TypeError("the target is not a JSON object")
        try:
            given = _parsed(answer)
        except (ValueError, RecursionError):
            return 0.0
        if not isinstance(given, dict):
            return 0.0
        right = sum(key in given and _canonical(given[key]) == _canonical(value) for key, value in wanted.items())
        return right / max(len(wanted), len(given)) if wanted or given else 1.0

    return json_fields


def _max_words(limit: str) -> Metric:
    if not re.fullmatch("[1-9][0-9]{0,5}", limit):
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

COMPARES: Final = frozenset({"exact-match", "contains", "token-f1", "rouge-l", "bleu", "json-fields"})
"""Those of `NAMED` that compare an answer with a target text."""

_allowed: Final[dict[str, Metric]] = {}
"""Functions of one's own, by ``module:function``."""

_FUNCTION: Final = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")

_WITH_ARGUMENT: Final = {
    "regex": r"regex:^[A-Z].*\.$",
    "json-schema": 'json-schema:{"type": "object"}',
    "max-words": "max-words:12",
}


def _target(row: TargetRow) -> str:
    return _composed(str(row[1]))


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _parsed(text: str) -> Any:
    """The value of JSON. Raises `ValueError`."""
    return json.loads(_composed(text), parse_constant=_no_number)


def _canonical(value: Any) -> str:
    """Equal for equal JSON values: 1.0 is 1, true is not."""
    return json.dumps(_whole(value), sort_keys=True)


def _whole(value: Any) -> Any:
    """JSON ``value`` with integers in place of the floats that are equal to them."""
    if isinstance(value, dict):
        return {key: _whole(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
