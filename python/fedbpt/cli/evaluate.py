"""``fedbpt evaluate``: a tuned prompt against the model without it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer
from msgspec import UNSET
from rich.table import Table

from fedbpt import api, models
from fedbpt.answering import LINES, AnswerComparison, compare_answers
from fedbpt.cli.hint import print_hint
from fedbpt.cli.options import AllowMetrics, AsJson, GpuLayers, GpuName, Quiet, Threads, allow_metrics, chosen_task
from fedbpt.cli.report import print_accuracies, print_chance, print_perplexities
from fedbpt.display.plain_console import PlainConsole
from fedbpt.engine.native_scorer import load_model
from fedbpt.errors import ConfigError
from fedbpt.plain_text import echo
from fedbpt.prompts.prompt import Prompt
from fedbpt.results import EvaluationResult
from fedbpt.runs.result import Score
from fedbpt.tasks import read_task_rows


def evaluate(
    prompt_file: Annotated[Path, typer.Argument(help="A prompt file written by fedbpt.", show_default=False)],
    data: Annotated[Path, typer.Option("--data", "-d", help="Rows to evaluate on: JSONL or CSV.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model name or .gguf file. Default: the one in the prompt file.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="Task name or file. Default: the one in the prompt file.")
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option(
            "--train",
            help="For a task with a metric of generated answers: training rows, for examples and the constant answer.",
        ),
    ] = None,
    allow_metric: AllowMetrics = None,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    gpu: GpuName = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure accuracy or perplexity with a tuned prompt and without it, on the same rows and template.

    A task with a metric of generated answers is measured by it, also with examples in the context and for the best
    constant answer.

    Example: fedbpt evaluate prompt.safetensors --data test.csv
    """
    prompt = Prompt.load(prompt_file)
    chosen = chosen_task(task, prompt.task, prompt.task_name)
    if chosen.labels != prompt.labels:
        raise ConfigError(
            f"the prompt has labels {list(prompt.labels)}, but task {chosen.name} has {list(chosen.labels)}: give its"
            " own task with --task",
            field="--task",
        )
    allow_metrics(allow_metric, chosen)
    rows = read_task_rows(chosen, data)
    scorer = load_model(model or model_of(prompt), n_threads=threads, n_gpu_layers=gpu_layers, gpu=gpu)
    prompt.check(scorer)
    print_hint(scorer, shown=not (quiet or as_json))
    if chosen.generation is not UNSET and prompt.spec.in_front:
        echo("hint: answers under a prompt in front are not measured: perplexity of the target texts", err=True)
        train = None
    elif chosen.generation is not UNSET:
        known = None if train is None else read_task_rows(chosen, train)
        _print_answers(compare_answers(scorer, chosen, rows, prompt, known), as_json, quiet)
        return
    if train is not None:
        raise ConfigError(
            f"task {chosen.name} has no metric of generated answers, so --train is not used: leave it out, or give the"
            " task a [generation] (docs/tasks.md)",
            field="--train",
        )
    found = {
        "zero_shot": api.evaluate(scorer, chosen, rows, template=prompt.template),
        "tuned": api.evaluate(scorer, chosen, rows, prompt),
    }
    if as_json:
        echo(json.dumps({name: _as_json(result, not chosen.labels) for name, result in found.items()}))
    elif quiet:
        tuned = found["tuned"]
        echo(f"{tuned.accuracy if chosen.labels else tuned.perplexity:.4f}")
    elif not chosen.labels:
        title = f"{prompt.task_name} on {scorer.name}, {len(rows)} rows"
        print_perplexities(
            PlainConsole(), title, {name.replace("_", "-"): result.loss for name, result in found.items()}
        )
    else:
        lines = {name.replace("_", "-"): (r.accuracy, r.interval, r.loss) for name, r in found.items()}
        console = PlainConsole()
        zero = found["zero_shot"]
        print_accuracies(console, f"{prompt.task_name} on {scorer.name}, {len(rows)} rows", lines)
        print_chance(console, Score(n=zero.n, correct=zero.correct, loss_sum=zero.n * zero.loss), len(chosen.labels))


def _print_answers(found: AnswerComparison, as_json: bool, quiet: bool) -> None:
    if as_json:
        lines = {
            name: {
                "mean": line.mean,
                "interval": line.interval if math.isfinite(line.interval[0]) else None,
                "distinct": line.distinct,
                "failed": line.n_failed,
                "answers": list(line.answers),
            }
            for name, line in found.lines.items()
        }
        echo(json.dumps({"metric": found.metric, "n": len(found.rows), "improved": found.improved, "lines": lines}))
        return
    if quiet:
        echo(f"{found.lines['tuned'].mean:.4f}")
        return
    console = PlainConsole()
    table = Table(title=f"{found.metric}, {len(found.rows)} rows", box=None)
    for heading in ("", "mean", "95 % interval", "distinct", "failed"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, line in found.lines.items():
        low, high = line.interval
        table.add_row(
            LINES[name],
            f"{line.mean:.3f}",
            f"{low:.3f} – {high:.3f}" if math.isfinite(low) else "",
            f"{line.distinct:.0%}",
            str(line.n_failed),
        )
    console.print(table)
    console.print(found.verdict(), markup=False, highlight=False)
    for each in found.side_by_side():
        console.print(f"\n{each.pop('text')} → {each.pop('target')}", markup=False, highlight=False)
        for name, answer in each.items():
            if name != "constant":
                console.print(f"  {LINES[name]}: {answer}", markup=False, highlight=False)


def model_of(prompt: Prompt) -> str:
    """The name of the model that the prompt was tuned for. Raises `ConfigError` if that was a file."""
    if prompt.model_name not in models.CATALOGUE:
        raise ConfigError(
            f"the prompt was tuned with a model file, {prompt.model_name}: give its path with --model", field="--model"
        )
    return prompt.model_name


def _as_json(result: EvaluationResult, generates: bool) -> dict[str, Any]:
    if generates:
        return {"n": result.n, "perplexity": result.perplexity, "loss": result.loss}
    return {
        "n": result.n,
        "accuracy": result.accuracy,
        "interval": result.interval,
        "loss": result.loss,
        "predictions": result.predictions.tolist(),
    }
