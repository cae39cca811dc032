"""``fedbpt dashboard``: show a stored run in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from fedbpt.cli.credentials import token_in
from fedbpt.cli.observe import print_watch_link
from fedbpt.cli.options import AllowInsecure, AsJson, Cert, Key, Questions, Quiet
from fedbpt.cli.reach import host_and_port
from fedbpt.cli.runs import DEFAULT_STORE, RunName, Store, TaskFile, open_store, run_task
from fedbpt.dashboard import DEFAULT_ADDRESS
from fedbpt.dashboard.comparison import Comparison, models_of_run, questions_of
from fedbpt.dashboard.server import DashboardServer
from fedbpt.engine.native_scorer import load_model
from fedbpt.errors import ConfigError
from fedbpt.net.tls import Tls
from fedbpt.plain_text import echo
from fedbpt.protocol import codec
from fedbpt.runs.as_json import task_of_run
from fedbpt.runs.result import RunResult
from fedbpt.runs.store import StoredRun
from fedbpt.side_by_side import SideBySide
from fedbpt.side_by_side.votes import Votes


def dashboard(
    run: RunName,
    store: Store = DEFAULT_STORE,
    at: Annotated[str, typer.Option("--at", help="HOST:PORT to serve the dashboard at.")] = DEFAULT_ADDRESS,
    token: Annotated[
        Path | None,
        typer.Option("--token-file", help="Require the token in this file from browsers; created if absent."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The run's model, for the compare page. Default: its name in the run."),
    ] = None,
    task: TaskFile = None,
    questions: Questions = None,
    votes: Annotated[
        Path | None,
        typer.Option("--votes", help="Let the compare page ask which reply is better; add it to this file as a row."),
    ] = None,
    cert: Cert = None,
    key: Key = None,
    allow_insecure: AllowInsecure = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show a run of a store in the browser, finished or running in another process, until Ctrl-C.

    Example: fedbpt dashboard demo --store runs/demo-0/runs.db
    """
    with open_store(store) as found:
        stored = found.get_run(run)
    result = None if stored.result is None or stored.status != "finished" else codec.decode(stored.result, RunResult)
    comparison = None if result is None else _comparison(stored, result, model, task, questions, votes)
    if votes is not None and comparison is None:
        raise ConfigError(
            f"--votes: run {run!r} cannot be compared: it must be finished, and its task known (--task)",
            field="--votes",
        )
    host, port = host_and_port("--at", at)
    secret = None if token is None else token_in(token)
    server = DashboardServer(store, run, host, port, token=secret, tls=Tls(cert, key), allow_insecure=allow_insecure)

    server.comparison = comparison

    def announce(_url: str) -> None:
        if as_json:
            echo(msgspec.json.encode({"ready": {"url": server.link}}).decode())
        elif not quiet:
            echo(f"run {run} at {server.link}; Ctrl-C stops it", err=True)
            print_watch_link(server, lambda line: echo(line, err=True))

    server.on_ready = announce
    server.run()


def _comparison(
    stored: StoredRun,
    result: RunResult,
    model: str | None,
    task: str | None,
    questions: Path | None,
    votes: Path | None,
) -> Comparison | None:
    """What the compare page needs; the model is loaded at the first question. None if the run's task is unknown."""
    if task is None and questions is None and task_of_run(stored) is None:
        return None
    known = run_task(stored, task)
    offered = () if questions is None else questions_of(known, questions)

    def make() -> SideBySide:
        return models_of_run(load_model(model or result.model_name), known, result)

    return Comparison(make, known.labels, offered, votes=None if votes is None else Votes(votes, known))
