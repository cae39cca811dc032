"""``fedbpt export``: write a prompt in other programs' formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedbpt.cli.evaluate import model_of
from fedbpt.cli.options import AsJson, Quiet, chosen_task
from fedbpt.engine.native_scorer import load_model
from fedbpt.exchange import Target, export_prompt
from fedbpt.plain_text import echo
from fedbpt.prompts.prompt import Prompt, card_path


def export(
    prompt_file: Annotated[Path, typer.Argument(help="A prompt file written by fedbpt.", show_default=False)],
    to: Annotated[Target, typer.Option("--to", help="Format: peft (an adapter folder), gguf or npy (a file).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder (peft) or file to write.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="peft: model name or .gguf file. Default: the prompt file's.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="peft: task name or file. Default: the prompt file's.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="peft: the base model's name at Hugging Face, or its folder.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a prompt and its model card for other programs: PEFT, GGUF or NumPy.

    Example: fedbpt export prompt.safetensors --to peft --out adapter
    """
    prompt = Prompt.load(prompt_file)
    if to == "peft":
        chosen = chosen_task(task, prompt.task, prompt.task_name)
        scorer = load_model(model or model_of(prompt))
        found = export_prompt(prompt, out, to, scorer=scorer, task=chosen, base_model=base)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        found = export_prompt(prompt, out, to)
    if as_json:
        card = out / "README.md" if to == "peft" else card_path(out)
        echo(json.dumps({"path": str(found.path), "card_path": str(card), "notes": found.notes}))
        return
    echo(str(found.path))
    if not quiet:
        for note in found.notes:
            echo(note, err=True)
