"""``fedbpt certs``: a private certificate authority."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from fedbpt.cli.options import AsJson, Quiet, help_without_command, print_json
from fedbpt.plain_text import echo

app = typer.Typer(
    name="certs",
    help="Make a private CA and certificates for TLS.\n\nExample: fedbpt certs init --host coordinator.lan",
)
app.callback(invoke_without_command=True)(help_without_command)

Folder = Annotated[Path, typer.Option("--dir", help="The folder of certificates and keys.")]
Hosts = Annotated[
    list[str] | None, typer.Option("--host", help="A host name or IP address of the machine; repeatable.")
]
DEFAULT_FOLDER = Path("certs")


@app.command("init")
def init_command(
    folder: Folder = DEFAULT_FOLDER, host: Hosts = None, as_json: AsJson = False, quiet: Quiet = False
) -> None:
    """Make a CA and the coordinator's certificate. Keep ca.key on this machine; copy ca.pem to every device.

    Example: fedbpt certs init --host coordinator.lan --host 192.168.1.10
    """
    from fedbpt.net import certs  # needs an optional dependency

    own = [name for name in (socket.gethostname(),) if certs.is_host(name)]
    hosts = dict.fromkeys(["localhost", "127.0.0.1", "::1", *own, *(host or [])])
    made = certs.init(folder, {"coordinator": list(hosts)})
    _print({"ca": made, "coordinator": certs.pair(folder, "coordinator")}, as_json, quiet)


@app.command("issue")
def issue_command(
    name: Annotated[str, typer.Argument(help="Whose certificate: a device's name.", show_default=False)],
    folder: Folder = DEFAULT_FOLDER,
    host: Hosts = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make a device's certificate, for serving over TLS or as client certificate when it calls (--client-certs).

    Example: fedbpt certs issue pi5 --host pi5.lan
    """
    from fedbpt.net import certs

    _print({name: certs.issue(folder, name, host or ())}, as_json, quiet)


def _print(made: Mapping[str, tuple[Path, Path]], as_json: bool, quiet: bool) -> None:
    if as_json:
        shown = {name: {"cert": str(cert), "key": str(key)} for name, (cert, key) in made.items()}
        print_json(shown)
        return
    for cert, key in made.values():
        echo(str(cert) if quiet else f"{cert}, its key in {key} (keep it private)")
