"""`answers` and `compare_answers`: what a model replies to a task's texts, beside what a person would try first.

A tuned prompt is compared with the model as it is, with a few examples in the model's context, and with the best
constant answer, which a metric may rate highly though it ignores the text.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from fedbpt.api import named_rows
from fedbpt.argument_types import checked
from fedbpt.engine.text_generator import GREEDY, GeneratingPlan, Sampling, TextModel
from fedbpt.errors import ConfigError, DataError
from fedbpt.html_tables import html_table
from fedbpt.machine.interrupts import interruptible
from fedbpt.metrics import Metric, filled, metric_named, rewards_of
from fedbpt.objective.answers import answering_plan
from fedbpt.prompts.prompt import Prompt
from fedbpt.protocol.seeding import generator
from fedbpt.protocol.specs import Generation, PromptSpec, Template
from fedbpt.quantities import PositiveInt
from fedbpt.runs.intervals import Z_95
from fedbpt.search.projection import start_rows
from fedbpt.tasks import GivenTask, Row, Task, load
from fedbpt.tasks.task import bos_ids, continuation_ids, cue_ids, render_ids, target_ids

log = logging.getLogger(__name__)

N_EXAMPLES: Final = 3
"""Rows in the model's context, of the line `examples`."""

CONSTANTS: Final = 64
"""Maximum number of answers that are tried as the best constant one."""

CONSTANT_ROWS: Final = 256
"""Maximum number of training rows on which they are tried."""

_BETWEEN: Final = "\n\n"  # examples

LINES: Final[Mapping[str, str]] = {
    "zero_shot": "untuned",
    "examples": "examples in context",
    "constant": "best constant answer",
    "tuned": "tuned",
}
"""The lines of a comparison and how they are called."""


@checked
@interruptible()
def answers(
    scorer: TextModel,
    task: GivenTask,
    rows: Any,
    prompt: Prompt | None = None,
    *,
    template: Template | None = None,
    examples: Sequence[Row] = (),
    sampling: Sampling = GREEDY,
) -> list[str]:
    """The model's answers to the texts of ``rows``, many at a time, cut at the task's stop strings.

    Args:
        scorer: the model.
        task: a task of target texts, or its name or file.
        rows: in any form that `fedbpt.tune` takes.
        prompt: the tuned prompt, in the cue or in layers; None: the model as it is.
        template: how texts are presented; None: the prompt's own, or the task's first.
        examples: rows that are shown with their target texts before each text.
        sampling: how tokens are chosen.

    Raises:
        InputError: a prompt in front, or a text too long for the context.
        ConfigError: the task has labels.
        PromptError: the prompt was made for another model.
    """
    task = load(task)
    chosen = template or (task.templates[0] if prompt is None else prompt.template)
    return answer_texts(scorer, task, named_rows("rows", rows, task), prompt, chosen, examples, sampling)


def answer_texts(
    scorer: TextModel,
    task: Task,
    rows: Sequence[Row],
    prompt: Prompt | None,
    template: Template,
    examples: Sequence[Row] = (),
    sampling: Sampling = GREEDY,
) -> list[str]:
    settings = generation_of(task)
    plan = compile_answers(scorer, task, rows, prompt, template, examples, keep_kv=False)
    start = start_rows(scorer, cue_ids(scorer, template), PromptSpec(d=1)) if prompt is None else prompt.rows
    stop = (*settings.stop, _BETWEEN) if examples else settings.stop  # else it would go on with examples of its own
    found = plan.generate(np.asarray(start)[None], None, sampling, max_tokens=settings.max_tokens, stop=stop)
    return [answer.text.strip() for answer in found[0]]


def compile_answers(
    scorer: TextModel,
    task: Task,
    rows: Sequence[Row],
    prompt: Prompt | None,
    template: Template,
    examples: Sequence[Row] = (),
    keep_kv: bool = True,
) -> GeneratingPlan:
    """The texts of ``rows``, laid out to be continued under prompts like ``prompt``. Raises as `answers`."""
    if prompt is not None:
        prompt.check(scorer)
    spec = PromptSpec(d=1) if prompt is None else prompt.spec
    limit = task.max_text_tokens
    shown = [_example(scorer, template, row, limit, len(bos_ids(scorer))) for row in examples]
    return answering_plan(scorer, template, [str(text) for text, _ in rows], limit, spec, shown, keep_kv)


def _example(scorer: TextModel, template: Template, row: Row, limit: int, n_bos: int) -> NDArray[np.int32]:
    """Token ids of a text with its target, and an empty line."""
    text = render_ids(scorer, template, row[0], limit)[n_bos:]
    target = target_ids(scorer, template, str(row[1]), limit)
    return np.concatenate([text, target, continuation_ids(scorer, _BETWEEN, "an empty line")])


def generation_of(task: Task) -> Generation:
    """How the task's answers are generated. Raises `ConfigError` for a task with labels."""
    if task.labels:
        raise ConfigError(f"task {task.name!r} has labels, which are scored: give a task of target texts", field="task")
    return Generation() if task.generation is UNSET else task.generation


FEWEST_ROWS: Final = 6
"""Rows of which a mean has an interval: of fewer, even equal signs of all differences are no evidence at 95 %."""


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of a mean, by Student's t (its quantile to first order in 1/n); infinite for few rows."""
    mean = float(values.mean())
    freedom = len(values) - 1
    if len(values) < FEWEST_ROWS:
        return -math.inf, math.inf
    quantile = Z_95 + (Z_95**3 + Z_95) / (4 * freedom)
    half = quantile * float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean - half, mean + half


@dataclass(frozen=True, eq=False)
class AnswerLine:
    """The answers of one way to reply, and what the metric says of them.

    Attributes:
        answers: one for each row.
        rewards: the metric's values [n]; where it failed, 0 or the worst of all lines' if that is negative.
        n_failed: answers that the metric failed on; see `fedbpt.metrics.Rewards`.
    """

    answers: tuple[str, ...] = field(repr=False)
    rewards: NDArray[np.float64] = field(repr=False)
    n_failed: int

    @property
    def mean(self) -> float:
        return float(self.rewards.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean; infinite for fewer rows than `FEWEST_ROWS`."""
        return _interval(self.rewards)

    @property
    def distinct(self) -> float:
        """Share of distinct answers, 0 to 1: near 0 where the model ignores the text."""
        return len(set(self.answers)) / len(self.answers)


@dataclass(frozen=True, eq=False)
class AnswerComparison:
    """Ways to reply, measured on the same rows.

    Attributes:
        metric: its name.
        rows: the rows.
        lines: by key of `LINES`.
        n_examples: number of examples that were in the model's context.
    """

    metric: str
    rows: tuple[Row, ...] = field(repr=False)
    lines: Mapping[str, AnswerLine]
    n_examples: int = 0

    def gain(self, over: str) -> tuple[float, float]:
        """95 % interval of the mean gain of the tuned prompt over line ``over``, from the rows' differences."""
        return _interval(self.lines["tuned"].rewards - self.lines[over].rewards)

    @property
    def improved(self) -> bool:
        """Whether the tuned prompt beats all of the other lines beyond the 95 % interval; False if one is missing."""
        return not (set(LINES) - set(self.lines)) and not self._not_beaten

    def table(self) -> list[tuple[str, str]]:
        """The lines as (name, figures)."""
        found = []
        for name, title in LINES.items():
            if name in self.lines:
                line = self.lines[name]
                low, high = line.interval
                interval = f" [{low:.3f}, {high:.3f}]" if math.isfinite(low) else ""
                failed = f", {line.n_failed} failed" if line.n_failed else ""
                found.append((title, f"{line.mean:.3f}{interval}, {line.distinct:.0%} distinct{failed}"))
        return found

    def verdict(self) -> str:
        """Whether the tuned prompt improved, in one sentence."""
        if "tuned" not in self.lines:
            return "no prompt was measured"
        if self.lines["tuned"].n_failed == len(self.rows):
            return "not improved: the metric failed on all answers of the tuned prompt"
        if self._not_beaten:
            return f"not improved: not shown to be better than {', '.join(LINES[name] for name in self._not_beaten)}"
        missing = [LINES[name] for name in LINES if name not in self.lines]
        if missing:
            beaten = ", ".join(LINES[name] for name in self.lines if name != "tuned")
            if "constant" in self.lines:  # there are training rows
                return f"better than {beaten}; no example fits into the model's context beside a text"
            return f"better than {beaten}; give training rows to compare it with {' and '.join(missing)}"
        return "improved: better than all others beyond the 95 % interval"

    @property
    def _not_beaten(self) -> list[str]:
        tuned = self.lines["tuned"]
        nothing = tuned.n_failed == len(tuned.answers)
        return [name for name in self.lines if name != "tuned" and (nothing or self.gain(name)[0] <= 0)]

    def side_by_side(self, n: int = 10) -> list[dict[str, str]]:
        """The first ``n`` texts with their target and each line's answer."""
        return [
            {"text": str(text), "target": str(target), **{name: line.answers[i] for name, line in self.lines.items()}}
            for i, (text, target) in enumerate(self.rows[:n])
        ]

    def _repr_html_(self) -> str:
        title = f"{self.metric} on {len(self.rows):,} rows: {self.verdict()}"
        shown = []
        for each in self.side_by_side():
            found = " · ".join(f"{title}: {each[name]}" for name, title in LINES.items() if name in each)
            shown.append((f"{each['text'][:60]} → {each['target']}", found))
        return html_table(title, self.table()) + html_table("Answers", shown)

    def __repr__(self) -> str:
        lines = "; ".join(f"{name} {figures}" for name, figures in self.table())
        return f"AnswerComparison({self.metric}, n={len(self.rows)}: {lines}; {self.verdict()})"


@checked
@interruptible()
def compare_answers(
    scorer: TextModel,
    task: GivenTask,
    rows: Any,
    prompt: Prompt | None = None,
    train: Any = None,
    *,
    template: Template | None = None,
    metric: str | Metric | None = None,
    n_examples: PositiveInt = N_EXAMPLES,
    seed: int = 0,
) -> AnswerComparison:
    """Measure the answers of a tuned prompt, the bare model, the model with examples, and the best constant answer.

    Args:
        scorer, task, rows, prompt, template: as for `answers`.
        train: rows for the examples and the constant answer; none of ``rows``. None: these lines are left out.
        metric: name of a metric (`fedbpt.metrics.NAMED`), or a function of (text, answer, row) that returns a number,
            higher for a better answer; row is (text, target text). None: the task's.
        n_examples: number of examples in the model's context.
        seed: draws the examples from ``train``.

    Raises:
        ConfigError, MissingExtraError: no such metric, or its library is missing.
        InputError, PromptError: as `answers`.
        DataError: no rows.
    """
    task = load(task)
    data = named_rows("rows", rows, task)
    settings = generation_of(task)
    if callable(metric):
        measure, name = metric, getattr(metric, "__name__", "reward")
    else:
        name = metric or settings.metric
        measure = metric_named(name)
    if not data:
        raise DataError("there are no rows to compare answers on: give at least one", field="rows")
    chosen = template or (task.templates[0] if prompt is None else prompt.template)

    said: dict[str, list[str]] = {}
    if prompt is not None:  # first: it may not fit
        said["tuned"] = answer_texts(scorer, task, data, prompt, chosen)
    said["zero_shot"] = answer_texts(scorer, task, data, None, chosen)
    shown: list[Row] = []
    if train is not None:
        known = named_rows("train", train, task)
        order = generator(seed, "examples").permutation(len(known))
        shown = fitting_examples(scorer, task, chosen, [known[i] for i in order[:n_examples]])
        if shown:
            said["examples"] = answer_texts(scorer, task, data, None, chosen, shown)
        own = [known[i] for i in order[:CONSTANT_ROWS]]
        said["constant"] = [best_constant(measure, own, settings.stop)] * len(data)
    ordered = {each: said[each] for each in LINES if each in said}
    measured = [rewards_of(measure, data, each) for each in ordered.values()]
    values = filled(np.stack([each.values for each in measured]))
    lines = {
        each: AnswerLine(tuple(said[each]), own_values, found.n_failed)
        for each, own_values, found in zip(ordered, values, measured, strict=True)
    }
    return AnswerComparison(name, tuple(data), lines, len(shown))


def fitting_examples(scorer: TextModel, task: Task, template: Template, examples: list[Row]) -> list[Row]:
    """As many of the examples, the first ones, as leave room for any text of the task and its answer."""
    limit = task.max_text_tokens
    room = scorer.n_ctx_train - len(render_ids(scorer, template, "x")) - limit - generation_of(task).max_tokens
    lengths = [len(_example(scorer, template, row, limit, 0)) for row in examples]
    fitting = [row for row, end in zip(examples, np.cumsum(lengths).tolist(), strict=True) if end <= room]
    if len(fitting) < len(examples):
        log.warning("%d of %d examples fit into the model's context", len(fitting), len(examples))
    return fitting


def best_constant(metric: Metric, rows: Sequence[Row], stop: Sequence[str] = ()) -> str:
    """The one of the rows' target texts that, as the answer to every text, has the highest mean reward.

    ``stop``: strings that end an answer, as no model could say what follows them.
    """
    said = (_until(str(target).strip(), stop) for _, target in rows)
    candidates = list(dict.fromkeys(each for each in said if each))[:CONSTANTS] or [""]
    values = filled(np.stack([rewards_of(metric, rows, [each] * len(rows)).values for each in candidates]))
    return candidates[int(np.argmax(values.mean(axis=1)))]


def _until(text: str, stop: Sequence[str]) -> str:
    """``text`` before the first of the strings ``stop``."""
    ends = [text.index(each) for each in stop if each in text]
    return text[: min(ends, default=len(text))].strip()
