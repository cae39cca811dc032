"""A run's result and cost, as tables for people and JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from fedbpt.coordinator.costs.estimate import RunCost
from fedbpt.display.console import describe_accuracy, human_bytes
from fedbpt.display.plain_console import PlainConsole
from fedbpt.plain_text import echo
from fedbpt.runs.intervals import beats_chance
from fedbpt.runs.result import (
    FUTILE,
    NOT_BETTER,
    UNSCORED,
    VARIANTS,
    RunResult,
    Score,
    Split,
    TemplateScore,
    perplexity,
)


def result_as_json(result: RunResult, prompt_path: Path | None) -> dict[str, Any]:
    """The object that ``--json`` prints. Traffic is the sum over devices, ``peak_rss_bytes`` the maximum."""
    return {
        "run": result.run,
        "task": result.task,
        "model": result.model_name,
        "template": result.template,
        "templates": [_candidate(each) for each in result.templates],
        **_figures(result, "zero_shot", result.zero_shot),
        **_figures(result, "tuned", result.tuned),
        "baselines": {
            name: score.perplexity if result.generates else score.accuracy for name, score in result.baselines.items()
        },
        "metric": result.metric,
        "answers": {
            name: {"n": found.n, "mean": found.mean, "distinct": found.distinct, "failed": found.n_failed}
            for name, found in result.answer_scores().items()
        },
        "shipped": result.shipped,
        "futile": result.futile,
        "n": result.tuned.n,
        "dev": {name: _score(result, score) for name, score in result.scores("dev").items()},
        "evaluations": result.evaluations,
        "tokens": result.tokens,
        "rounds": result.rounds,
        "seconds": result.seconds,
        "total_seconds": result.total_seconds,
        "bytes_up": result.bytes_up,
        "bytes_down": result.bytes_down,
        "peak_rss_bytes": max(device.peak_rss_bytes for device in result.devices),
        "epsilon": result.epsilon,
        "digest": result.digest,
        "devices": [
            {
                "name": device.name,
                "rows": device.info.n_train if device.info else None,
                "reports": device.reports,
                "bytes_up": device.bytes_up,
                "bytes_down": device.bytes_down,
                "peak_rss_bytes": device.peak_rss_bytes,
            }
            for device in result.devices
        ],
        "prompt_path": None if prompt_path is None else str(prompt_path),
    }


def _candidate(candidate: TemplateScore) -> dict[str, Any]:
    if candidate.reward is not None:
        figures = {"n": candidate.n_answered, "reward": candidate.reward}
        return {**msgspec.to_builtins(candidate.template), **figures}
    score = candidate.score
    n_labels = len(candidate.template.label_words)
    return {
        **msgspec.to_builtins(candidate.template),
        "n": score.n,
        "accuracy": score.accuracy,
        "interval": score.interval,
        "beats_chance": beats_chance(score.correct, score.n, n_labels),
    }


def _figures(result: RunResult, name: str, score: Score) -> dict[str, Any]:
    if result.generates:
        return {f"{name}_perplexity": score.perplexity}
    return {f"{name}_accuracy": score.accuracy, f"{name}_interval": score.interval}


def _score(result: RunResult, score: Score) -> dict[str, Any]:
    if result.generates:
        return {"n": score.n, "perplexity": score.perplexity}
    return {"n": score.n, "accuracy": score.accuracy, "interval": score.interval}


def print_result(result: RunResult, prompt_path: Path | None) -> None:
    """Print the tables at the end of a run."""
    console = PlainConsole()
    _print_scores(console, result, "test", "test rows, unused for tuning and selection")
    _print_scores(console, result, "dev", "development rows")
    _print_answers(console, result)
    for candidate in result.templates:
        line = f"zero-shot {describe_accuracy(candidate)}: {candidate.template.pattern!r}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    devices = Table(box=None)
    for heading in ("device", "rows", "reports", "up", "down", "peak memory"):
        devices.add_column(heading, justify="left" if heading == "device" else "right")
    for device in result.devices:
        devices.add_row(
            device.name,
            str(device.info.n_train) if device.info else "-",
            str(device.reports),
            human_bytes(device.bytes_up),
            human_bytes(device.bytes_down),
            human_bytes(device.peak_rss_bytes),
        )
    console.print(devices)
    console.print(
        f"{result.evaluations} evaluations in {result.rounds} rounds, {result.tokens:,} forward tokens, "
        f"{result.seconds:.0f} s of tuning"
    )
    if result.epsilon is not None and result.settings.privacy is not None:
        console.print(f"privacy: ε {result.epsilon:.2f} at δ {result.settings.privacy.delta:g} per training row")
    if result.futile:
        console.print(FUTILE, highlight=False, soft_wrap=True)
    if result.is_not_better:
        console.print(NOT_BETTER, highlight=False, soft_wrap=True)
    if result.shipped and result.rounds and not result.is_not_better and not result.futile:
        held = VARIANTS[result.shipped]
        console.print(f"tuned is: {held}, which held-out training rows chose", highlight=False, soft_wrap=True)
    if not (result.scores("test") or result.scores("dev")) and prompt_path is not None:
        say = f"no test rows: measure it with `fedbpt evaluate {prompt_path} --data FILE`"
        console.print(say, markup=False, highlight=False, soft_wrap=True)
    if prompt_path is not None:
        console.print(f"prompt: {prompt_path}", soft_wrap=True)


def _print_scores(console: PlainConsole, result: RunResult, split: Split, rows: str) -> None:
    """Print the table of a split, if anything was measured on it."""
    scores = {VARIANTS[name]: score for name, score in result.scores(split).items()}
    if not scores:
        return
    title = f"{result.task} on {result.model_name}: {scores['tuned'].n} {rows}"
    if result.generates:
        print_perplexities(console, title, {name: score.loss for name, score in scores.items()})
        return
    print_accuracies(
        console, title, {name: (score.accuracy, score.interval, score.loss) for name, score in scores.items()}
    )
    zero_shot = result.scores(split).get("zero_shot")
    if zero_shot is not None:
        print_chance(console, zero_shot, len(result.template.label_words))
    elif result.is_unscored:
        console.print(UNSCORED, highlight=False, soft_wrap=True)


def _print_answers(console: PlainConsole, result: RunResult) -> None:
    """Print what the model's own answers are worth, if that was measured."""
    scores = result.answer_scores()
    if not scores:
        return
    console.print(f"answers to {scores['tuned'].n} test rows, by {result.metric}", style="italic", highlight=False)
    table = Table()
    for heading in ("", "mean", "distinct", "failed"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, found in scores.items():
        table.add_row(VARIANTS[name], f"{found.mean:.3f}", f"{found.distinct:.0%}", str(found.n_failed))
    console.print(table)


def print_cost(cost: RunCost, as_json: bool) -> None:
    """Print the upper bound of a run's cost: a line per device, or JSON."""
    if as_json:
        echo(msgspec.json.encode(cost).decode())
        return
    console = PlainConsole()
    table = Table(box=None)
    for heading in ("device", "tokens", "time", "up", "down", "memory now"):
        table.add_column(heading, justify="left" if heading == "device" else "right")
    for device in cost.devices:
        time = "?" if device.seconds is None else f"{device.seconds / 60:.1f} min"
        sizes = (device.bytes_up, device.bytes_down, device.rss_bytes)
        table.add_row(device.name, f"{device.tokens:,}", time, *(human_bytes(size) for size in sizes))
    console.print(f"at most, for {cost.evaluations} evaluations in {cost.rounds} rounds of search:")
    console.print(table)
    for device in cost.devices:
        if device.words is None:
            console.print(f"{device.name} does not report the length of the label words: assuming one token each")
        elif device.words:
            console.print(f"{device.name}: label words add up to {device.words} tokens to each candidate and text")
    if cost.epsilon is not None:
        console.print(f"privacy: ε {cost.epsilon:.2f} per training row")


def print_accuracies(
    console: PlainConsole, title: str, lines: Mapping[str, tuple[float, tuple[float, float], float]]
) -> None:
    """Print a table of lines (accuracy, its 95 % interval, loss in nats), by name."""
    console.print(title, style="italic", highlight=False)
    table = Table()
    for heading in ("", "accuracy", "95 % interval", "loss"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, (accuracy, (low, high), loss) in lines.items():
        table.add_row(name, f"{accuracy:.3f}", f"{low:.3f} – {high:.3f}", f"{loss:.3f}")
    console.print(table)


def print_perplexities(console: PlainConsole, title: str, losses: Mapping[str, float]) -> None:
    """Print a table of mean losses, in nats per token, and their perplexities, by name."""
    console.print(title, style="italic", highlight=False)
    table = Table()
    for heading in ("", "perplexity", "loss"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, loss in losses.items():
        table.add_row(name, f"{perplexity(loss):.2f}", f"{loss:.3f}")
    console.print(table)


def print_chance(console: PlainConsole, zero_shot: Score, n_labels: int) -> None:
    """Print a note if the model without a prompt is no better than chance."""
    if zero_shot.n and not beats_chance(zero_shot.correct, zero_shot.n, n_labels):
        console.print(
            f"zero-shot is no better than chance ({1 / n_labels:.3f}): try other label words or another template",
            highlight=False,
        )
