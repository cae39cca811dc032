"""``fedbpt dashboard``: a stored run in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from fedbpt.cli.credentials import token_in
from fedbpt.cli.options import AllowInsecure, AsJson, Cert, Key, Quiet
from fedbpt.cli.reach import host_and_port
from fedbpt.cli.runs import DEFAULT_STORE, RunName, Store, open_store
from fedbpt.dashboard import DEFAULT_ADDRESS
from fedbpt.dashboard.server import DashboardServer
from fedbpt.tls import Tls


def dashboard(
    run: RunName,
    store: Store = DEFAULT_STORE,
    at: Annotated[str, typer.Option("--at", help="HOST:PORT to show it at.")] = DEFAULT_ADDRESS,
    token: Annotated[
        Path | None, typer.Option("--token-file", help="Ask browsers for the token in this file; made if absent.")
    ] = None,
    cert: Cert = None,
    key: Key = None,
    allow_insecure: AllowInsecure = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show a run of a store in the browser: finished, or under way elsewhere. Ctrl-C ends it.

    Example: fedbpt dashboard demo --store runs/demo-0/runs.db
    """
    with open_store(store) as found:
        found.get_run(run)
    host, port = host_and_port("--at", at)
    secret = None if token is None else token_in(token)
    server = DashboardServer(store, run, host, port, token=secret, tls=Tls(cert, key), allow_insecure=allow_insecure)

    def announce(_url: str) -> None:
        if as_json:
            typer.echo(msgspec.json.encode({"ready": {"url": server.link}}).decode())
        elif not quiet:
            typer.echo(f"run {run} at {server.link}; Ctrl-C ends it", err=True)

    server.on_ready = announce
    server.run()
