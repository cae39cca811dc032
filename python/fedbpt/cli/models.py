"""``fedbpt models``: list, pull, path, rm, check, requantize."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from fedbpt import models
from fedbpt.cli.model_check import check_command
from fedbpt.cli.options import AsJson, Quiet, Threads, help_without_command
from fedbpt.display.console import human_bytes
from fedbpt.display.plain_console import PlainConsole
from fedbpt.machine.info import physical_cores
from fedbpt.machine.wheel_files import Progress as OnProgress
from fedbpt.plain_text import echo

app = typer.Typer(
    name="models",
    help="Manage the models on this machine: list, pull, path, rm, check, requantize.\n\n"
    "Example: fedbpt models pull smollm2-135m",
)
app.callback(invoke_without_command=True)(help_without_command)

Name = Annotated[
    str, typer.Argument(help="A name from `fedbpt models list`, or hf.co/OWNER/REPO:FILE.gguf.", show_default=False)
]


@app.command("list")
def list_command(as_json: AsJson = False, quiet: Quiet = False) -> None:
    """List the catalogue, and which models are on this machine.

    Example: fedbpt models list --json
    """
    entries = models.list_models()
    if as_json:
        echo(json.dumps([_as_json(entry) for entry in entries]))
        return
    if quiet:
        for entry in entries:
            echo(entry.name)
        return
    table = Table(box=None)
    for heading in ("name", "model", "size", "licence", "here"):
        table.add_column(heading, justify="right" if heading == "size" else "left")
    for entry in entries:
        here = "yes" if entry.downloaded else "no"
        table.add_row(entry.name, entry.description, f"{entry.size / 1e6:,.0f} MB", entry.licence, here)
    PlainConsole().print(table)


@app.command("pull")
def pull_command(name: Name, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Download a model and verify its SHA-256, unless it is here already. Resumes an interrupted download.

    Name a file of a Hugging Face repository hf.co/OWNER/REPO:FILE.gguf; for a split model, give any of its parts.

    Example: fedbpt models pull smollm2-135m
    """
    with progress_bar(name, shown=not quiet) as progress:
        path = models.pull(name, progress)
    if as_json:
        echo(json.dumps({"name": name, "path": str(path), "fingerprint": models.fingerprint(path)}))
    else:
        echo(str(path))


@app.command("path")
def path_command(name: Name, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Print the path of a pulled model's file.

    Example: fedbpt models path smollm2-135m
    """
    del quiet  # only the result is printed anyway
    path = models.locate(name)
    if as_json:
        echo(json.dumps({"name": name, "path": str(path), "fingerprint": models.fingerprint(path)}))
    else:
        echo(str(path))


@app.command("rm")
def rm_command(name: Name, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Remove a pulled model, including partial downloads. Processes that use it fail with an error.

    Example: fedbpt models rm gemma3-270m
    """
    freed = models.remove(name)
    if as_json:
        echo(json.dumps({"name": name, "freed_bytes": freed}))
    elif not quiet:
        echo(f"removed {name}: {human_bytes(freed)}")


app.command("check")(check_command)


@app.command("requantize")
def requantize_command(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A name from `fedbpt models list`, or a .gguf file.", show_default=False),
    ],
    format: Annotated[
        str, typer.Argument(metavar="FORMAT", help=f"One of {', '.join(models.FORMATS)}.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file to write. Default: MODEL.FORMAT.gguf in the model's folder."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Convert a model to another format, for example one that is faster on this CPU, and print the new file's path.

    Example: fedbpt models requantize smollm2-135m q4_0
    """
    with progress_bar(f"writing {format}", not (quiet or as_json), unit="tensors") as progress:
        n_threads = threads or physical_cores()
        written = models.requantize(model, format, out, force=force, n_threads=n_threads, progress=progress)
    if as_json:
        found = {
            "path": str(written.path),
            "fingerprint": models.fingerprint(written.path),
            "format": written.format,
            "size_bytes": written.size,
            "source": str(written.source),
            "source_size_bytes": written.source_size,
        }
        echo(json.dumps(found))
        return
    echo(str(written.path))
    if not quiet:
        sizes = f"{human_bytes(written.source_size)} before, {human_bytes(written.size)} now"
        echo(f"{sizes}; requantizing may lose accuracy: measure it with `fedbpt evaluate`", err=True)


def _as_json(entry: models.ModelEntry) -> dict[str, object]:
    return {
        "name": entry.name,
        "description": entry.description,
        "licence": entry.licence,
        "size_bytes": entry.size,
        "downloaded": entry.downloaded,
        "path": None if entry.path is None else str(entry.path),
    }


@contextmanager
def progress_bar(name: str, shown: bool, unit: str = "bytes") -> Iterator[OnProgress | None]:
    """Show a progress bar with an ETA on standard error within the block; yields the function that updates it.

    The bar appears at the first update that is not the last, so that finished work shows none.
    """
    if not shown:
        yield None
        return
    figures: list[ProgressColumn] = [DownloadColumn(), TransferSpeedColumn()]
    if unit != "bytes":
        figures = [MofNCompleteColumn(), TextColumn(unit, markup=False)]
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), *figures, TimeRemainingColumn()]
    bar = Progress(*columns, console=PlainConsole(stderr=True))
    line = bar.add_task(name, total=None)

    def show(done: int, total: int | None) -> None:
        if done != total:
            bar.start()
        bar.update(line, completed=done, total=total)

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()
