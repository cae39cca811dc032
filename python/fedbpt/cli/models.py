"""``fedbpt models``: list, pull, path."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from fedbpt import models
from fedbpt.cli.options import AsJson, Quiet
from fedbpt.packages import Progress as OnProgress

app = typer.Typer(
    name="models",
    help="The models on this machine: list, pull, path.\n\nExample: fedbpt models pull smollm2-135m",
    no_args_is_help=True,
)

Name = Annotated[str, typer.Argument(help="A name from `fedbpt models list`.", show_default=False)]


@app.command("list")
def list_command(as_json: AsJson = False, quiet: Quiet = False) -> None:
    """List the catalogue, and which of it is on this machine.

    Example: fedbpt models list --json
    """
    entries = models.list_models()
    if as_json:
        typer.echo(json.dumps([_as_json(entry) for entry in entries]))
        return
    if quiet:
        for entry in entries:
            typer.echo(entry.name)
        return
    table = Table(box=None)
    for heading in ("name", "model", "size", "licence", "here"):
        table.add_column(heading, justify="right" if heading == "size" else "left")
    for entry in entries:
        here = "yes" if entry.downloaded else "no"
        table.add_row(entry.name, entry.description, f"{entry.size / 1e6:,.0f} MB", entry.licence, here)
    Console().print(table)


@app.command("pull")
def pull_command(name: Name, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Fetch a model and verify its sha256; does nothing where it is here already. Interrupted, it goes on next time.

    Example: fedbpt models pull smollm2-135m
    """
    with progress_bar(name, shown=not quiet) as progress:
        path = models.pull(name, progress)
    if as_json:
        typer.echo(json.dumps({"name": name, "path": str(path), "fingerprint": models.fingerprint(path)}))
    else:
        typer.echo(str(path))


@app.command("path")
def path_command(name: Name, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Print where a pulled model's file is.

    Example: fedbpt models path smollm2-135m
    """
    del quiet  # the path is the result: there is nothing else to leave out
    path = models.locate(name)
    if as_json:
        typer.echo(json.dumps({"name": name, "path": str(path), "fingerprint": models.fingerprint(path)}))
    else:
        typer.echo(str(path))


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
def progress_bar(name: str, shown: bool) -> Iterator[OnProgress | None]:
    """A progress bar with an ETA on standard error, so that standard output holds only the result."""
    if not shown:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        line = bar.add_task(name, total=None)

        def show(done: int, total: int | None) -> None:
            bar.update(line, completed=done, total=total)

        yield show
