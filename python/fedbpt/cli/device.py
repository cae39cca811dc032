"""``fedbpt device``: serve this machine's model and data to a coordinator."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from fedbpt.agent.server import AgentServer, announce
from fedbpt.agent.service import AgentService
from fedbpt.autostart import install
from fedbpt.cli.hint import print_hint
from fedbpt.cli.options import AsJson, GpuLayers, GpuName, KvBudget, Model, Quiet, TaskName, Threads
from fedbpt.errors import ConfigError
from fedbpt.local import Device
from fedbpt.memory import kv_budget_within
from fedbpt.models import locate
from fedbpt.native_scorer import DEFAULT_KV_BUDGET_BYTES, load_model
from fedbpt.pauses import TRIGGERS, Pauses
from fedbpt.tasks import Row, load, read_task_rows

MaxMemory = Annotated[
    int | None, typer.Option("--max-memory", min=1, help="MiB that the device may take: less KV is kept then.")
]
PauseOn = Annotated[
    str, typer.Option("--pause-on", help="Pause on battery, heat or user: any of them, with commas between.")
]
LoadLate = Annotated[
    bool, typer.Option("--load-late", help="Load the model at the first work: until then the device is small.")
]
InstallService = Annotated[
    bool, typer.Option("--install-service", help="Do not serve: write what starts this command with the machine.")
]
Force = Annotated[bool, typer.Option("--force", help="Let --install-service replace a file that differs.")]


def device(
    context: typer.Context,
    model: Model,
    data: Annotated[Path, typer.Option("--data", "-d", help="Rows to tune on: JSONL or CSV. They stay here.")],
    task: TaskName,
    test: Annotated[Path | None, typer.Option(help="Rows that only report the final accuracy.")] = None,
    dev: Annotated[Path | None, typer.Option(help="Rows that show the accuracy during the run.")] = None,
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve on; 0: any free one.")] = 8401,
    name: Annotated[str | None, typer.Option(help="What this device calls itself. Default: the host's name.")] = None,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    gpu: GpuName = None,
    kv_budget: KvBudget = DEFAULT_KV_BUDGET_BYTES // 2**20,
    max_memory: MaxMemory = None,
    pause_on: PauseOn = "",
    load_late: LoadLate = False,
    allow_insecure: Annotated[
        bool, typer.Option("--allow-insecure", help="Serve beyond loopback without encryption, on a trusted network.")
    ] = False,
    until_eof: Annotated[
        bool, typer.Option("--until-eof", help="Stop when standard input ends: for a program that starts devices.")
    ] = False,
    install_service: InstallService = False,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Serve this machine's model and data to a coordinator, until Ctrl-C. The data stay here.

    Example: fedbpt device --model smollm2-135m --data mine.jsonl --task ag-news --port 8401
    """
    rows = _rows(task, data, dev, test)  # before the model: a wrong file is told at once
    shown = not (quiet or as_json)
    pauses = _pauses(pause_on, shown)
    kv_bytes = _kv_bytes(model, kv_budget, max_memory)
    if install_service:
        _install(context, max_memory, force, as_json)
        return
    scorer = load_model(
        model, n_threads=threads, n_gpu_layers=gpu_layers, gpu=gpu, kv_budget_bytes=kv_bytes, late=load_late
    )
    print_hint(scorer, shown and not load_late)
    own_name = name or socket.gethostname()

    def ready(host: str, port: int) -> None:
        if as_json:
            announce(host, port)
        elif shown:
            served = f"{scorer.name} and {len(rows[0])} rows"
            typer.echo(f"{own_name} serves {served} on http://{host}:{port}; Ctrl-C stops it")

    if until_eof:
        threading.Thread(target=_stop_at_eof, daemon=True).start()
    device = Device(own_name, scorer, *rows)
    if not load_late:
        device.measure_speed()  # for `fedbpt tune --plan`
    service = AgentService(device, pause=pauses.reason)
    AgentServer(service, host, port, on_ready=ready, allow_insecure=allow_insecure).run()


def _rows(task: str, *files: Path | None) -> list[list[Row]]:
    chosen = load(task)
    return [[] if file is None else read_task_rows(chosen, file) for file in files]


def _kv_bytes(model: str, kv_budget: int, max_memory: int | None) -> int:
    """Both in MiB. Raises `ConfigError` where the model takes more than ``max_memory``."""
    weights = locate(model).stat().st_size
    wanted = kv_budget * 2**20
    return wanted if max_memory is None else kv_budget_within(max_memory * 2**20, weights, wanted)


def _pauses(given: str, shown: bool) -> Pauses:
    """What ``--pause-on`` says. Raises `ConfigError` for a trigger that there is not."""
    on = [word.strip() for word in given.split(",") if word.strip()]
    wrong = [word for word in on if word not in TRIGGERS]
    if wrong:
        raise ConfigError(f"--pause-on {wrong[0]}: there are {', '.join(TRIGGERS)}")

    def say(reason: str) -> None:
        if shown:
            typer.echo(f"paused: {reason}" if reason else "goes on", err=True)

    pauses = Pauses([trigger for trigger in TRIGGERS if trigger in on], say)
    for trigger in pauses.untold() if shown else []:
        typer.echo(f"hint: this system does not tell of {trigger}: the device never pauses on it", err=True)
    return pauses


def _install(context: typer.Context, max_memory: int | None, force: bool, as_json: bool) -> None:
    """Write what starts the command that was given, less the options of this."""
    command = [sys.executable, "-m", "fedbpt", "device"]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.name in ("install_service", "force") or value in (None, parameter.default):
            continue
        command += [parameter.opts[0]] if value is True else [parameter.opts[0], str(value)]
    found = install(command, max_memory=max_memory, force=force)
    if as_json:
        typer.echo(json.dumps({"path": str(found.path), "enable": found.enable, "remove": found.remove}))
        return
    typer.echo(f"wrote {found.path}\nenable: {found.enable}\nremove: {found.remove}\n{found.notes}")


def _stop_at_eof() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
