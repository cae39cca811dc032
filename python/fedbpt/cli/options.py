"""Options shared by several commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from msgspec import UNSET

from fedbpt import tasks
from fedbpt.dashboard import DEFAULT_ADDRESS
from fedbpt.errors import ConfigError
from fedbpt.metrics import allow_metric, metric_named
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
    int | None, typer.Option("--threads", min=1, help="Number of compute threads. Default: the physical cores.")
]
KvBudget = Annotated[int, typer.Option("--kv-budget", min=0, help="MiB for cached KV of the texts; more is faster.")]
GpuLayers = Annotated[
    int, typer.Option("--gpu-layers", help="Number of layers on the GPU; -1: all. Needs a GPU build.")
]
GpuName = Annotated[str | None, typer.Option("--gpu", help="Name of the GPU, if there are several; with --gpu-layers.")]
Registry = Annotated[Path, typer.Option("--registry", help="The database of devices that may call in.")]
Ca = Annotated[Path | None, typer.Option("--ca", help="Trust only certificates signed by this CA (PEM).")]
Cert = Annotated[Path | None, typer.Option("--cert", help="This side's TLS certificate (PEM); with --key.")]
Key = Annotated[Path | None, typer.Option("--key", help="The certificate's private key (PEM).")]
ClientCerts = Annotated[
    bool, typer.Option("--client-certs", help="Require clients to show a certificate signed by --ca (mutual TLS).")
]
AllowInsecure = Annotated[
    bool, typer.Option("--allow-insecure", help="Allow unencrypted connections beyond loopback; on trusted networks.")
]
Questions = Annotated[
    Path | None, typer.Option("--questions", help="Held-out rows to offer on the dashboard's compare page.")
]


CoordinatorUrl = Annotated[
    str | None, typer.Option("--coordinator", help="Address of a `fedbpt coordinator`, which runs the runs.")
]
AdminToken = Annotated[
    Path | None,
    typer.Option("--admin-token", help="File of the coordinator's admin token. Default: runs/admin.token."),
]
Dashboard = Annotated[
    str | None,
    typer.Option(
        "--dashboard", metavar="[HOST:PORT]", help=f"Show and control the run in a browser, at {DEFAULT_ADDRESS}."
    ),
]
DashboardToken = Annotated[
    Path | None,
    typer.Option("--dashboard-token", help="Require the token in this file from browsers; created if absent."),
]
AllowMetrics = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-metric",
        help="A function, package.module:function, that the task may name as its metric of answers; repeatable.",
    ),
]


def status_printer(silent: bool) -> Callable[[str], None]:
    """A function that prints a line to standard error, or nothing if ``silent``."""
    return lambda line: None if silent else echo(line, err=True)


def print_json(value: Any) -> None:
    """Print one JSON value to standard output. Bytes of a path that are not UTF-8 are escaped as surrogates."""
    try:
        text = msgspec.json.encode(value).decode()
    except UnicodeEncodeError:
        text = json.dumps(msgspec.to_builtins(value))
    echo(text)


def help_without_command(context: typer.Context) -> None:
    """Print the help of a command group that is called without a command."""
    if context.invoked_subcommand is None:
        echo(context.get_help())


def chosen_task(given: str | None, stored: tasks.Task | None, name: str) -> tasks.Task:
    """The task of ``--task`` or, if not given, the one stored in a prompt file or run.

    Raises `ConfigError` if there is neither: earlier versions stored only the task's ``name``.
    """
    if given is not None:
        return tasks.load(given)
    if stored is None:
        raise ConfigError(
            f"an earlier version of fedbpt stored only the name of task {name}: give its task file with --task",
            field="--task",
        )
    return stored


def allow_metrics(names: list[str] | None, task: tasks.Task) -> None:
    """Let the task name these functions. Raises `ConfigError` or `MissingExtraError` if its metric cannot be used."""
    for name in names or ():
        allow_metric(name)
    if task.generation is not UNSET:
        metric_named(task.generation.metric)
