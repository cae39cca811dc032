"""Options that several commands share, so that they read and mean the same everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from fedbpt import tasks
from fedbpt.dashboard import DEFAULT_ADDRESS
from fedbpt.errors import ConfigError
from fedbpt.plain_text import echo

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; print nothing but the result.")]
Model = Annotated[
    str, typer.Option("--model", "-m", help="A name from `fedbpt models list`, or a .gguf file.", show_default=False)
]
TaskName = Annotated[
    str, typer.Option("--task", "-t", help="A built-in task (ag-news, sst-2, bbc-news) or a task file.")
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads that compute. Default: the physical cores.")
]
KvBudget = Annotated[int, typer.Option("--kv-budget", min=0, help="MiB of the texts' KV to keep, for speed.")]
GpuLayers = Annotated[int, typer.Option("--gpu-layers", help="Layers on the GPU; -1: all. Needs a GPU build.")]
GpuName = Annotated[str | None, typer.Option("--gpu", help="Which GPU, of several; with --gpu-layers.")]
Registry = Annotated[Path, typer.Option("--registry", help="The database of devices that may call in.")]
Ca = Annotated[Path | None, typer.Option("--ca", help="Believe certificates of this CA alone (PEM).")]
Cert = Annotated[Path | None, typer.Option("--cert", help="Our certificate for TLS (PEM); with --key.")]
Key = Annotated[Path | None, typer.Option("--key", help="The certificate's private key (PEM).")]
ClientCerts = Annotated[
    bool, typer.Option("--client-certs", help="Ask who connects for a certificate of --ca, too (mutual TLS).")
]
AllowInsecure = Annotated[
    bool, typer.Option("--allow-insecure", help="No encryption beyond loopback: on a network you trust.")
]
Questions = Annotated[
    Path | None, typer.Option("--questions", help="Held-out rows that the dashboard's compare page offers.")
]


Dashboard = Annotated[
    str | None,
    typer.Option("--dashboard", metavar="[HOST:PORT]", help=f"Show and steer the run in a browser; {DEFAULT_ADDRESS}."),
]


def teller(silent: bool) -> Callable[[str], None]:
    """Tells people a line, beside what a command prints."""
    return lambda line: None if silent else echo(line, err=True)


def print_json(value: Any) -> None:
    """One JSON value on standard output; of a path whose bytes are no UTF-8, they are escaped as Python reads them."""
    try:
        text = msgspec.json.encode(value).decode()
    except UnicodeEncodeError:
        text = json.dumps(msgspec.to_builtins(value))
    echo(text)


def help_without_command(context: typer.Context) -> None:
    """Callback of a group of commands: alone, it shows its help."""
    if context.invoked_subcommand is None:
        echo(context.get_help())


def chosen_task(given: str | None, carried: tasks.Task | None, name: str) -> tasks.Task:
    """The task of ``--task``, else the one that a prompt file or a run carries.

    Raises `ConfigError` where neither is there: ``name`` is all that earlier versions kept.
    """
    if given is not None:
        return tasks.load(given)
    if carried is None:
        raise ConfigError(
            f"an earlier version of fedbpt kept the name of task {name} alone: say where its task file is with --task"
        )
    return carried
