"""``fedbpt devices``: the devices that may call in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.table import Table

from fedbpt.cli.options import AsJson, Quiet, Registry, help_without_command
from fedbpt.coordinator.devices.enrolment import INVITATION_S, DeviceRegistry, check_device_name
from fedbpt.display.plain_console import PlainConsole
from fedbpt.errors import StoreError
from fedbpt.plain_text import echo

app = typer.Typer(
    name="devices",
    help="Manage the devices that may call in: invite, list, revoke.\n\nExample: fedbpt devices invite pixel",
)
app.callback(invoke_without_command=True)(help_without_command)

Name = Annotated[str, typer.Argument(help="The device's name in every run.", show_default=False)]
DEFAULT_REGISTRY = Path("runs/devices.db")


@app.command("invite")
def invite_command(
    name: Name,
    minutes: Annotated[
        float, typer.Option(min=1, max=60 * 24, help="How long the code is valid, in minutes.")
    ] = INVITATION_S / 60,
    registry: Registry = DEFAULT_REGISTRY,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Print a one-time code with which a device enrols: `fedbpt device --coordinator URL --enrol CODE`.

    Example: fedbpt devices invite pixel
    """
    check_device_name(name)  # before the registry is created
    with DeviceRegistry(registry) as opened:
        code = opened.invite(name, minutes * 60)
    if as_json:
        echo(msgspec.json.encode({"device": name, "code": code, "minutes": minutes}).decode())
    elif quiet:
        echo(code)
    else:
        echo(
            f"{code} enrols {name} once, within {minutes:g} minutes, while `fedbpt coordinator` or"
            " `fedbpt tune --listen` runs"
        )


@app.command("list")
def list_command(registry: Registry = DEFAULT_REGISTRY, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """List invited, enrolled and revoked devices.

    Example: fedbpt devices list
    """
    with _opened(registry) as opened:
        found = opened.devices()
    if as_json:
        echo(msgspec.json.encode([line._asdict() for line in found]).decode())
    elif quiet:
        for line in found:
            echo(line.device)
    else:
        table = Table("device", "state", "since", box=None)
        for line in found:
            table.add_row(*line)
        PlainConsole().print(table)


@app.command("revoke")
def revoke_command(
    name: Name, registry: Registry = DEFAULT_REGISTRY, as_json: AsJson = False, quiet: Quiet = False
) -> None:
    """Revoke a device's access, from its next call on, even during a run.

    Example: fedbpt devices revoke pixel
    """
    with _opened(registry) as opened:
        opened.revoke(name)
    if as_json:
        echo(msgspec.json.encode({"device": name, "state": "revoked"}).decode())
    elif not quiet:
        echo(f"{name} is revoked; `fedbpt devices invite {name}` re-admits it")


def _opened(registry: Path) -> DeviceRegistry:
    if not registry.is_file():
        raise StoreError(f"no device registry at {registry}: run `fedbpt devices invite NAME` to create one")
    return DeviceRegistry(registry)
