"""``fedbpt import``: convert a Hugging Face PEFT adapter to a prompt file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedbpt import tasks
from fedbpt.cli.options import AsJson, Model, Quiet
from fedbpt.engine.native_scorer import load_model
from fedbpt.exchange import import_prompt
from fedbpt.plain_text import echo
from fedbpt.prompts.prompt import card_path


def import_(
    folder: Annotated[Path, typer.Argument(help="A PEFT prompt-tuning adapter's folder.", show_default=False)],
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The prompt file to write.")],
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="Its task, a name or file; not for adapters exported by fedbpt.")
    ] = None,
    template: Annotated[int, typer.Option("--template", min=0, help="Which of the task's templates, from 0.")] = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Convert a PEFT prompt-tuning adapter to a prompt file for `fedbpt evaluate` and other commands.

    Example: fedbpt import adapter --model smollm2-135m --task ag-news --out prompt.safetensors
    """
    prompt = import_prompt(folder, load_model(model), None if task is None else tasks.load(task), template)
    out.parent.mkdir(parents=True, exist_ok=True)
    path = prompt.save(out)
    if as_json:
        echo(json.dumps({"prompt_path": str(path), "card_path": str(card_path(path))}))
        return
    echo(str(path))
    if not quiet:
        echo(f"{prompt!r}", err=True)
