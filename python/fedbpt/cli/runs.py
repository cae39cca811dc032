"""``fedbpt runs``: the runs in a store."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer
from rich.table import Table

from fedbpt.api import make_prompt
from fedbpt.cli.hand_over import Coordinator, print_job
from fedbpt.cli.options import (
    AdminToken,
    AllowInsecure,
    AsJson,
    Ca,
    Cert,
    CoordinatorUrl,
    Key,
    Quiet,
    chosen_task,
    help_without_command,
    print_json,
)
from fedbpt.cli.report import print_result, result_as_json
from fedbpt.cli.run_report import print_report, report_json, report_page
from fedbpt.coordinator.ledger import RunLedger, is_of
from fedbpt.coordinator.monitoring.run_report import report_of
from fedbpt.coordinator.reports.round_reports import purpose_of
from fedbpt.display.console import STAGE_NAMES
from fedbpt.display.plain_console import PlainConsole
from fedbpt.engine.native_scorer import load_model
from fedbpt.errors import ConfigError, StoreError
from fedbpt.machine.files import write_whole
from fedbpt.net.tls import Tls
from fedbpt.plain_text import echo
from fedbpt.protocol import codec
from fedbpt.runs.as_json import round_as_json, run_as_json, task_of_run
from fedbpt.runs.result import RunResult
from fedbpt.runs.settings import stored_settings
from fedbpt.runs.store import RunStore, StoredRun
from fedbpt.runs.tensorboard import write_scalars
from fedbpt.tasks import Task

app = typer.Typer(
    name="runs",
    help="Manage the runs in a store, or of a coordinator:"
    " list, show, report, export, scalars, cancel, delete.\n\nExample: fedbpt runs list",
)
app.callback(invoke_without_command=True)(help_without_command)

Store = Annotated[Path, typer.Option("--store", help="The run database.")]
RunName = Annotated[str, typer.Argument(help="A name from `fedbpt runs list`.", show_default=False)]
TaskFile = Annotated[
    str | None, typer.Option("--task", "-t", help="The run's task file; for runs of an earlier version of fedbpt.")
]
DEFAULT_STORE = Path("runs/runs.db")

NARROW: Final = 100
"""Columns of a terminal below which a list of runs has fewer columns, rather than cut names."""

WIDE: Final = 400
"""Columns where the output is no terminal."""


@app.command("list")
def list_command(
    store: Store = DEFAULT_STORE,
    coordinator: CoordinatorUrl = None,
    admin_token: AdminToken = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    allow_insecure: AllowInsecure = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """List the runs of a store or, with --coordinator, those that were handed to a coordinator.

    Example: fedbpt runs list --store runs/runs.db
    """
    if coordinator is not None:
        _list_jobs(Coordinator(coordinator, admin_token, Tls(cert, key, ca), allow_insecure), as_json, quiet)
        return
    with open_store(store) as opened:
        runs = opened.list_runs()
        searched = {} if as_json or quiet else {run.run: _searched(opened, run) for run in runs}
    if as_json:
        print_json([run_as_json(run) for run in runs])
    elif quiet:
        for run in runs:
            echo(run.run)
    else:
        console = PlainConsole(width=None if sys.stdout.isatty() else WIDE)
        narrow = console.width < NARROW
        table = Table(box=None)
        for heading in ("run", "task", "model", "status", "rounds", "accuracy", "updated"):
            if not (narrow and heading in ("model", "updated")):
                is_number = heading in ("rounds", "accuracy")
                table.add_column(heading, justify="right" if is_number else "left", overflow="fold")
        for run in runs:
            result = _result(run)
            figure = "-"
            if result and result.tuned.n:
                tuned = result.tuned
                figure = f"ppl {tuned.perplexity:.2f}" if result.generates else f"{tuned.accuracy:.3f}"
            left = [run.run, run.task] if narrow else [run.run, run.task, run.model_name]
            right = [run.status, str(searched[run.run]), figure]
            table.add_row(*left, *right, *([] if narrow else [run.updated]))
        console.print(table)


def _list_jobs(coordinator: Coordinator, as_json: bool, quiet: bool) -> None:
    with coordinator.connected() as runs:
        jobs = runs.jobs()
    if as_json:
        print_json(msgspec.to_builtins(jobs))
    elif quiet:
        for job in jobs:
            echo(job.run)
    else:
        table = Table(box=None)
        for heading in ("run", "task", "method", "state", "handed in", "ended", ""):
            table.add_column(heading)
        for job in jobs:
            state = f"{job.state} ({job.ahead} before it)" if job.ahead else job.state
            table.add_row(job.run, job.task, job.method, state, job.handed_in[:19], job.ended[:19], job.detail)
        PlainConsole().print(table)


@app.command("cancel")
def cancel_command(
    run: RunName,
    coordinator: Annotated[str, typer.Option("--coordinator", help="Address of the `fedbpt coordinator`.")],
    admin_token: AdminToken = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    allow_insecure: AllowInsecure = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Stop a run of a coordinator, or take it out of its queue. Closed rounds are kept; handed in again, it resumes.

    Example: fedbpt runs cancel news --coordinator http://127.0.0.1:8400
    """
    with Coordinator(coordinator, admin_token, Tls(cert, key, ca), allow_insecure).connected() as runs:
        job = runs.cancel(run)
    if as_json or not quiet:
        print_job(job, as_json)


@app.command("show")
def show_command(run: RunName, store: Store = DEFAULT_STORE, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Show a run: its result if finished, and each round with the devices that reported or were lost.

    Example: fedbpt runs show demo --json
    """
    with open_store(store) as opened:
        found, history = opened.get_run(run), opened.history(run)
        names = _names_of_rounds(opened, run)
    result = _result(found)
    if as_json:
        shown = {**run_as_json(found), "rounds": [round_as_json(line) for line in history]}
        print_json({**shown, "result": result_as_json(result, None) if result else None})
        return
    if result is not None:
        print_result(result, None)
    else:
        n_searched = sum(name.isdecimal() for name in names.values())
        echo(f"run {run} is {found.status} after {n_searched} rounds: start it again to resume")
    if quiet:
        return
    table = Table(box=None)
    for heading in ("round", "reported", "lost", "figures"):
        table.add_column(heading, justify="right" if heading == "round" else "left")
    for line in history:
        lost = "; ".join(f"{name}: {reason}" for name, reason in line.lost.items())
        overall = {name: value for name, value in line.metrics.items() if "/" not in name}  # omit per-device metrics
        figures = ", ".join(f"{name} {value:.4g}" for name, value in sorted(overall.items()))
        table.add_row(names.get(line.round, "-"), str(len(line.reported)), lost, figures)
    PlainConsole().print(table)


@app.command("report")
def report_command(
    run: RunName,
    target: Annotated[
        float | None, typer.Option("--target", min=0, help="Accuracy (0 to 1) or perplexity whose cost is wanted.")
    ] = None,
    watts: Annotated[
        float | None, typer.Option("--watts", min=0, help="Power of a device at work, to compute joules.")
    ] = None,
    page: Annotated[Path | None, typer.Option("--page", help="Also write the report as an HTML file.")] = None,
    store: Store = DEFAULT_STORE,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show what a run reached within budgets, what it cost to reach a target, and what faults cost.

    Example: fedbpt runs report demo --target 0.9 --watts 6 --page report.html
    """
    with open_store(store) as opened:
        found = report_of(opened, run, target, watts)
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_whole({page: report_page(found).encode()})
    if as_json:
        print_json(report_json(found))
    elif not quiet:
        print_report(found)


@app.command("export")
def export_command(
    run: RunName,
    model: Annotated[str, typer.Option("--model", "-m", help="The model that the run tuned: a name or .gguf file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The prompt file to write.")],
    task: TaskFile = None,
    store: Store = DEFAULT_STORE,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a finished run's prompt as a file.

    Example: fedbpt runs export demo --model smollm2-135m --out prompt.safetensors
    """
    del quiet  # only the result is printed anyway
    with open_store(store) as opened:
        found = opened.get_run(run)
    result = _result(found)
    if result is None:
        raise ConfigError(
            f"run {run} is {found.status}, and only a finished run has a prompt: start it again to finish it",
            field="run",
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    path = make_prompt(load_model(model), run_task(found, task), result).save(out)
    if as_json:
        print_json({"run": run, "prompt_path": str(path)})
    else:
        echo(str(path))


@app.command("replay")
def replay_command(
    run: RunName,
    task: TaskFile = None,
    store: Store = DEFAULT_STORE,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Recompute a run from its stored reports, and check that every round has the stored digests.

    Example: fedbpt runs replay demo
    """
    with open_store(store) as opened:
        found = opened.get_run(run)
        settings, result = stored_settings(found.settings), _result(found)
        ledger = RunLedger(opened, run, run_task(found, task), settings, settings.aggregator())
        n_rounds, digest = ledger.replay_stored(), ledger.state.aggregator.digest()
    if result is not None and found.status == "finished" and digest != result.digest:
        raise StoreError(
            f"run {run} replays to digest {digest}, but its result has {result.digest}: the store was modified,"
            " restore it from a backup"
        )
    if as_json:
        print_json({"run": run, "n_rounds": n_rounds, "digest": digest})
    else:
        echo(digest if quiet else f"replayed {n_rounds} rounds to the stored digests; final digest {digest}")


@app.command("delete")
def delete_command(
    run: RunName,
    store: Store = DEFAULT_STORE,
    force: Annotated[
        bool, typer.Option("--force", help="Delete it even if its status is running, for example after a crash.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Delete a run from a store, with its rounds, reports and metrics. Prompt files stay.

    Example: fedbpt runs delete demo
    """
    with open_store(store) as opened:
        found = opened.get_run(run)
        if found.status == "running" and not force:
            raise ConfigError(
                f"run {run} is running, or its coordinator crashed: stop it first, or give --force", field="--force"
            )
        with opened.held(run):
            opened.delete_run(run)
    if as_json:
        print_json({"run": run, "n_rounds": found.n_rounds})
    elif not quiet:
        echo(f"deleted run {run} of {found.n_rounds} rounds")


@app.command("scalars")
def scalars_command(
    run: RunName,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="TensorBoard's log folder; the run gets a folder of its own in it.")
    ],
    store: Store = DEFAULT_STORE,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a run's metrics by round for TensorBoard.

    Example: fedbpt runs scalars demo --out tensorboard
    """
    del quiet  # only the result is printed anyway
    with open_store(store) as opened:
        folder = write_scalars(opened.history(run), out / run)
    if as_json:
        print_json({"run": run, "folder": str(folder)})
    else:
        echo(str(folder))


@contextmanager
def open_store(path: Path) -> Iterator[RunStore]:
    """Open an existing store. Raises `StoreError` if there is none."""
    if not path.is_file():
        raise StoreError(f"no run database at {path}: give its path with --store, or start a run")
    with RunStore(path) as store:
        yield store


def run_task(run: StoredRun, given: str | None) -> Task:
    """The task of a run: ``given`` with ``--task``, or else the stored one.

    Raises `ConfigError` if ``given`` is not the run's task, or none is known.
    """
    task = chosen_task(given, task_of_run(run), run.task)
    stored = given is None and run.definition is not None
    if not stored and not is_of(run, stored_settings(run.settings), task):
        raise ConfigError(
            f"run {run.run} was started with another task than {task.name}: give its task file with --task",
            field="--task",
        )
    return task


def _names_of_rounds(store: RunStore, run: str) -> dict[int, str]:
    """The displayed name of each closed round: its number in the search, or its stage."""
    names = {}
    searched = 0
    for closed in store.rounds(run):
        purpose = purpose_of(closed.reports)
        searched += purpose == "search"
        names[closed.round] = str(searched) if purpose == "search" else STAGE_NAMES[purpose]
    return names


def _searched(store: RunStore, run: StoredRun) -> int:
    """Number of rounds of the search, which is what users see as rounds."""
    result = _result(run)
    if result is not None and run.status == "finished":
        return result.rounds
    return sum(name.isdecimal() for name in _names_of_rounds(store, run.run).values())


def _result(run: StoredRun) -> RunResult | None:
    return None if run.result is None else codec.decode(run.result, RunResult)
