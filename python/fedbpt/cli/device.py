"""``fedbpt device``: serve this machine's model and data to a coordinator."""

from __future__ import annotations

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
from fedbpt.cli.hint import print_hint
from fedbpt.cli.options import AsJson, GpuLayers, GpuName, KvBudget, Model, Quiet, TaskName, Threads
from fedbpt.local import Device
from fedbpt.native_scorer import DEFAULT_KV_BUDGET_BYTES, load_model
from fedbpt.tasks import Row, load, read_task_rows


def device(
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
    allow_insecure: Annotated[
        bool, typer.Option("--allow-insecure", help="Serve beyond loopback without encryption, on a trusted network.")
    ] = False,
    until_eof: Annotated[
        bool, typer.Option("--until-eof", help="Stop when standard input ends: for a program that starts devices.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Serve this machine's model and data to a coordinator, until Ctrl-C. The data stay here.

    Example: fedbpt device --model smollm2-135m --data mine.jsonl --task ag-news --port 8401
    """
    chosen = load(task)

    def rows(path: Path | None) -> list[Row]:
        return [] if path is None else read_task_rows(chosen, path)

    train, dev_rows, test_rows = rows(data), rows(dev), rows(test)  # before the model: a wrong file is told at once
    scorer = load_model(model, n_threads=threads, n_gpu_layers=gpu_layers, gpu=gpu, kv_budget_bytes=kv_budget * 2**20)
    print_hint(scorer, shown=not (quiet or as_json))
    own_name = name or socket.gethostname()

    def ready(host: str, port: int) -> None:
        if as_json:
            announce(host, port)
        elif not quiet:
            typer.echo(
                f"{own_name} serves {scorer.name} and {len(train)} rows on http://{host}:{port}; Ctrl-C stops it"
            )

    if until_eof:
        threading.Thread(target=_stop_at_eof, name="fedbpt-until-eof", daemon=True).start()
    device = Device(own_name, scorer, train, dev_rows, test_rows)
    device.measure_speed()  # for `fedbpt tune --plan`
    service = AgentService(device)
    AgentServer(service, host, port, on_ready=ready, allow_insecure=allow_insecure).run()


def _stop_at_eof() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
