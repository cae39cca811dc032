"""``fedbpt tasks``: create task files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from fedbpt import models
from fedbpt.cli.options import AsJson, Quiet, help_without_command
from fedbpt.engine.native_scorer import NativeScorer, load_model
from fedbpt.errors import ConfigError
from fedbpt.machine.files import write_whole
from fedbpt.plain_text import echo
from fedbpt.tasks import Draft, WordCosts, draft_task, task_toml, word_costs, word_notes

app = typer.Typer(name="tasks", help="Create task files.\n\nExample: fedbpt tasks new data.csv")
app.callback(invoke_without_command=True)(help_without_command)

Data = Annotated[Path, typer.Argument(help="Labelled rows: CSV, TSV or JSONL.", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="The task file to write. Default: NAME.toml.")]
Name = Annotated[str | None, typer.Option("--name", help="The task's name. Default: the data file's.")]
TextColumn = Annotated[str | None, typer.Option("--text-column", help="The column of the texts. Default: detected.")]
LabelColumn = Annotated[str | None, typer.Option("--label-column", help="The column of the labels. Default: detected.")]
CountedBy = Annotated[
    str | None, typer.Option("--model", "-m", help="Model that counts tokens. Default: the first that was pulled.")
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")]


@app.command("new")
def new_command(
    data: Data,
    out: Out = None,
    name: Name = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    model: CountedBy = None,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a task file for labelled rows: labels, label words and two templates, for you to edit.

    Example: fedbpt tasks new support.csv --model smollm2-135m
    """
    draft = draft_task(data, name, text_column, label_column)
    path = out or Path(f"{draft.task.name}.toml")
    if path.exists() and not force:
        raise ConfigError(f"{path} exists: give another name with --out, or --force to overwrite it", field="--out")
    scorer = _token_counter(model)
    costs = word_costs(scorer, draft.task) if scorer else []
    text = task_toml(draft.task, costs, scorer.name if scorer else "")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole({path: text.encode()})
    if as_json:
        echo(msgspec.json.encode(_as_json(path, draft, scorer, costs)).decode())
    elif quiet:
        echo(str(path))
    else:
        _print(path, draft, scorer)


def _token_counter(model: str | None) -> NativeScorer | None:
    """The model that counts tokens; None if there is none on this machine."""
    pulled = [entry.name for entry in models.list_models() if entry.downloaded]
    chosen = model or next(iter(pulled), None)
    return load_model(chosen) if chosen else None


def _as_json(path: Path, draft: Draft, scorer: NativeScorer | None, costs: list[WordCosts]) -> dict[str, Any]:
    task = draft.task
    return {
        "path": str(path),
        "name": task.name,
        "labels": dict(zip(task.labels, draft.counts, strict=True)),
        "text_column": task.text_columns[0],
        "label_column": task.label_column,
        "model": scorer.name if scorer else None,
        "templates": [
            {**msgspec.to_builtins(template), "tokens": costs[i].tokens if costs else None}
            for i, template in enumerate(task.templates)
        ],
    }


def _print(path: Path, draft: Draft, scorer: NativeScorer | None) -> None:
    task = draft.task
    counts = ", ".join(f"{label} {count}" for label, count in zip(task.labels, draft.counts, strict=True))
    echo(f"wrote {path}: texts in column {task.text_columns[0]!r}, labels in {task.label_column!r}")
    echo(f"{len(task.labels)} labels in {sum(draft.counts)} rows: {counts}")
    for note in word_notes(scorer, task) if scorer else []:
        echo(note)
    if scorer is None:
        echo("no model to count the tokens of label words: give --model, or pull one (fedbpt models pull)")
    echo("edit its words and templates, then pass it as --task")
