"""``fedbpt models check``: test whether a model file works with fedbpt."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer
from rich.table import Table
from rich.text import Text

from fedbpt.cli.options import AsJson, GpuLayers, GpuName, Quiet, Threads
from fedbpt.display.console import human_bytes
from fedbpt.display.plain_console import PlainConsole
from fedbpt.model_check import CHECKS, ModelCheck, check_model
from fedbpt.plain_text import echo

_VERDICTS = {True: "ok", False: "FAILED", None: "-"}
_STYLES = {True: "green", False: "bold red", None: "dim"}


def check_command(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A name from `fedbpt models list`, or a .gguf file.", show_default=False),
    ],
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    gpu: GpuName = None,
    timeout: Annotated[int, typer.Option("--timeout", min=1, help="Time limit in seconds.")] = 600,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Test a model file in a separate process: load, score, generate. Exit code 1 if a check fails.

    Example: fedbpt models check model.gguf
    """
    with PlainConsole(stderr=True).status(f"checking {model}") as status:
        if quiet or as_json:
            status.stop()
        found = check_model(
            model,
            n_threads=threads,
            n_gpu_layers=gpu_layers,
            gpu=gpu,
            timeout_s=timeout,
            on_check=lambda name: status.update(f"checking {model}: {CHECKS[name]}"),
        )
    if as_json:
        echo(msgspec.json.encode(_as_json(found)).decode())
    elif not quiet:
        _print(found)
    if not found.holds:
        raise typer.Exit(1)


def _as_json(found: ModelCheck) -> dict[str, object]:
    facts = None if found.facts is None else msgspec.structs.asdict(found.facts)
    findings = [msgspec.structs.asdict(finding) for finding in found.findings]
    return {"path": found.path, "holds": found.holds, "facts": facts, "checks": findings}


def _print(found: ModelCheck) -> None:
    console = PlainConsole()
    facts = found.facts
    if facts is not None:
        table = Table(box=None, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        files = f" in {facts.n_files} files" if facts.n_files > 1 else ""
        table.add_row("architecture", facts.architecture)
        table.add_row("size", f"{facts.n_params / 1e6:,.0f} million parameters, {human_bytes(facts.size)}{files}")
        table.add_row("formats", ", ".join(facts.formats))
        table.add_row("context", f"{facts.n_ctx:,} tokens")
        table.add_row("vocabulary", f"{facts.n_vocab:,} tokens, embedding size {facts.n_embd:,}")
        table.add_row("chat template", "yes" if facts.chat else "no: it only continues texts")
        table.add_row("fingerprint", facts.fingerprint)
        for note in facts.notes:
            table.add_row("note", note)
        console.print(table)
        console.print()
    table = Table(box=None)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found")
    table.add_column("s", justify="right", no_wrap=True)
    for finding in found.findings:
        verdict = Text(_VERDICTS[finding.holds], style=_STYLES[finding.holds])
        seconds = "" if finding.holds is None else f"{finding.seconds:.1f}"
        table.add_row(CHECKS[finding.name], verdict, finding.detail, seconds)
    console.print(table)
