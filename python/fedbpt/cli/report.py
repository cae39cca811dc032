"""A run's result, as a table for people and as JSON for machines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from fedbpt.display import human_bytes
from fedbpt.estimate import RunCost
from fedbpt.plain_text import echo
from fedbpt.results import wilson_interval
from fedbpt.runs import BASELINES, RunResult, Score, perplexity
from fedbpt.terminal import PlainConsole


def result_as_json(result: RunResult, prompt_path: Path | None) -> dict[str, Any]:
    """The keys that ``--json`` prints. Bytes are totals over devices, ``peak_rss_bytes`` is the largest device's."""
    return {
        "run": result.run,
        "task": result.task,
        "model": result.model_name,
        "template": result.template,
        **_figures(result, "zero_shot", result.zero_shot),
        **_figures(result, "tuned", result.tuned),
        "baselines": {name: score.accuracy for name, score in result.baselines.items()},
        "n": result.tuned.n,
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


def _figures(result: RunResult, name: str, score: Score) -> dict[str, Any]:
    if result.generates:
        return {f"{name}_perplexity": score.perplexity}
    return {f"{name}_accuracy": score.accuracy, f"{name}_interval": _interval(score)}


def print_result(result: RunResult, prompt_path: Path | None) -> None:
    """The table at the end of a run."""
    console = PlainConsole()
    if result.tuned.n:
        others = {title: result.baselines[name] for name, title in BASELINES.items() if name in result.baselines}
        scores = {"zero-shot": result.zero_shot, **others, "tuned": result.tuned}
        title = f"{result.task} on {result.model_name}: {result.tuned.n} held-out rows, which chose nothing"
        if result.generates:
            print_perplexities(console, title, {name: score.loss for name, score in scores.items()})
        else:
            lines = {name: (score.accuracy, _interval(score), score.loss) for name, score in scores.items()}
            print_accuracies(console, title, lines)
    devices = Table(box=None)
    for heading in ("device", "rows", "rounds", "up", "down", "peak memory"):
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
        console.print(f"ε {result.epsilon:.2f} at δ {result.settings.privacy.delta:g}, of one training row of a device")
    if prompt_path is not None:
        console.print(f"prompt: {prompt_path}", soft_wrap=True)


def print_cost(cost: RunCost, as_json: bool) -> None:
    """What a run will cost at most: a line per device, or JSON."""
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
    if cost.epsilon is not None:
        console.print(f"ε {cost.epsilon:.2f} of one training row of a device")


def print_accuracies(
    console: PlainConsole, title: str, lines: Mapping[str, tuple[float, tuple[float, float], float]]
) -> None:
    """A line each of (accuracy, its 95 % interval, loss in nats)."""
    console.print(title, style="italic", highlight=False)
    table = Table()
    for heading in ("", "accuracy", "95 % interval", "loss"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, (accuracy, (low, high), loss) in lines.items():
        table.add_row(name, f"{accuracy:.3f}", f"{low:.3f} – {high:.3f}", f"{loss:.3f}")
    console.print(table)


def print_perplexities(console: PlainConsole, title: str, losses: Mapping[str, float]) -> None:
    """A line each of mean losses in nats a token."""
    console.print(title, style="italic", highlight=False)
    table = Table()
    for heading in ("", "perplexity", "loss"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, loss in losses.items():
        table.add_row(name, f"{perplexity(loss):.2f}", f"{loss:.3f}")
    console.print(table)


def _interval(score: Score) -> tuple[float, float]:
    return wilson_interval(score.correct, score.n)
