"""``fedbpt tune``: coordinate a run over devices, or tune on this machine alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fedbpt.cli.devices import DEFAULT_REGISTRY
from fedbpt.cli.here import Chosen, Files
from fedbpt.cli.observe import Observers
from fedbpt.cli.options import (
    AllowInsecure,
    AsJson,
    Ca,
    Cert,
    ClientCerts,
    Dashboard,
    GpuLayers,
    GpuName,
    Key,
    Questions,
    Quiet,
    Registry,
    Threads,
)
from fedbpt.cli.reach import Reach
from fedbpt.cli.tuning import Output, Tuning, print_plan, print_plan_here, prompt_path
from fedbpt.coordinator.one_machine import NAME
from fedbpt.device.device import Device
from fedbpt.engine.native_scorer import load_model
from fedbpt.errors import ConfigError
from fedbpt.net.tls import Tls
from fedbpt.runs.run_file import load_config

RunFile = Annotated[
    Path | None,
    typer.Argument(help="The run file (TOML): task, devices, settings. Not needed with --data.", show_default=False),
]
Data = Annotated[
    Path | None, typer.Option("--data", "-d", help="Rows to tune on, on this machine alone: no device, no run file.")
]
Dev = Annotated[Path | None, typer.Option("--dev", help="With --data: rows that show the accuracy during the run.")]
Test = Annotated[Path | None, typer.Option("--test", help="With --data: rows that only report the final accuracy.")]
OwnTask = Annotated[str | None, typer.Option("--task", "-t", help="Without a run file: the task's name or file.")]
OwnRun = Annotated[
    str | None, typer.Option("--run", help="Without a run file: the run's name in the store. Default: the task's.")
]
OwnStore = Annotated[
    Path | None, typer.Option("--store", help="Without a run file: the run database. Default: runs/runs.db.")
]
Evaluations = Annotated[int | None, typer.Option(min=1, help="Without a run file: candidates to score. Default: 1600.")]
Seconds = Annotated[float | None, typer.Option(min=0, help="Without a run file: how long to tune.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Without a run file: of everything random. Default: 0.")]
Addresses = Annotated[
    list[str] | None, typer.Option("--device", help="A device's address, as often as needed; adds to the file's.")
]
PromptFile = Annotated[Path | None, typer.Option("--out", "-o", help="Where to write the tuned prompt.")]
OwnModel = Annotated[
    str | None, typer.Option("--model", "-m", help="The model; with devices, theirs: needed to write the prompt.")
]
Listen = Annotated[
    str | None, typer.Option("--listen", help="HOST:PORT where enrolled devices call in; --device adds others.")
]
Expect = Annotated[
    int | None, typer.Option(min=1, help="Begin when so many devices call in. Default: all enrolled or invited.")
]
Tokens = Annotated[Path | None, typer.Option("--tokens", help='Devices\' tokens: TOML lines "ADDRESS" = "TOKEN".')]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Start over; the stored run is forgotten when the first round closes.")
]
Log = Annotated[Path | None, typer.Option("--log", help="Add what happens to this file, a line of JSON each.")]
Monitor = Annotated[
    str | None, typer.Option("--monitor", help="HOST:PORT to watch the run at: JSON, events, Prometheus metrics.")
]
MonitorToken = Annotated[
    Path | None, typer.Option("--monitor-token", help="The monitor asks for the token in this file; made if absent.")
]
DashboardToken = Annotated[
    Path | None,
    typer.Option("--dashboard-token", help="The dashboard asks for this file's token; made if absent."),
]
OnlyPlan = Annotated[
    bool, typer.Option("--plan", help="Ask the devices, print what the run will cost at most, and do nothing.")
]


def tune(
    run_file: RunFile = None,
    model: OwnModel = None,
    task: OwnTask = None,
    data: Data = None,
    dev: Dev = None,
    test: Test = None,
    run: OwnRun = None,
    store: OwnStore = None,
    evaluations: Evaluations = None,
    seconds: Seconds = None,
    seed: Seed = None,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    gpu: GpuName = None,
    device: Addresses = None,
    prompt_file: PromptFile = None,
    listen: Listen = None,
    expect: Expect = None,
    registry: Registry = DEFAULT_REGISTRY,
    tokens: Tokens = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    client_certs: ClientCerts = False,
    allow_insecure: AllowInsecure = False,
    log: Log = None,
    monitor: Monitor = None,
    monitor_token: MonitorToken = None,
    dashboard: Dashboard = None,
    dashboard_token: DashboardToken = None,
    questions: Questions = None,
    fresh: Fresh = False,
    only_plan: OnlyPlan = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Tune over devices, or on this machine alone. Ctrl-C loses at most one round: the same command goes on.

    Example: fedbpt tune --model smollm2-135m --task support.toml --data train.csv --test test.csv
    """
    asked = _Asked(
        run_file,
        model,
        Chosen(task, run, store, evaluations, seconds, seed),
        Reach(device or (), tokens, listen, expect, registry, Tls(cert, key, ca, client_certs), allow_insecure),
        Observers(log, monitor, monitor_token, Tls(cert, key), allow_insecure, dashboard, dashboard_token),
        Output(prompt_file, questions, as_json, quiet),
        {"n_threads": threads, "n_gpu_layers": gpu_layers, "gpu": gpu},
        fresh,
        only_plan,
    )
    if data is not None:
        _tune_here(asked, Files(data, dev, test))
    elif dev or test:
        raise ConfigError("--dev and --test go with --data, on this machine: devices have rows of their own")
    else:
        _tune_over_devices(asked)


@dataclass(frozen=True)
class _Asked:
    run_file: Path | None
    model: str | None
    chosen: Chosen
    reach: Reach
    observers: Observers
    output: Output
    engine: Mapping[str, Any]  # arguments of `load_model`
    fresh: bool
    only_plan: bool


def _tune_here(asked: _Asked, files: Files) -> None:
    if asked.reach.addresses or asked.reach.listen:
        raise ConfigError("--data is for a run on this machine: leave it out, or --device and --listen")
    config, task = asked.chosen.config(asked.run_file, asked.model)
    rows = files.rows(task)  # before the model: a wrong file is told at once
    out = prompt_path(config, asked.output.prompt, config.model)
    scorer = load_model(str(config.model), **asked.engine)
    if asked.only_plan:
        print_plan_here(config, task, Device(NAME, scorer, *rows, task=task), asked.output.as_json)
        return
    output = replace(asked.output, prompt=out, questions=asked.output.questions or files.test)
    Tuning(config, task, scorer, asked.observers, output, asked.fresh).here(rows)


def _tune_over_devices(asked: _Asked) -> None:
    if asked.run_file is None:
        raise ConfigError(
            "give a run file (fedbpt tune run.toml), or tune on this machine alone with --model, --task and --data"
        )
    asked.chosen.refuse(asked.run_file)
    config, task = load_config(asked.run_file)
    reach = replace(asked.reach, addresses=[*config.devices, *asked.reach.addresses])
    if not (reach.addresses or reach.listen):
        raise ConfigError(
            f"no devices: name them in {asked.run_file} (devices = [...]) or with --device http://HOST:PORT, let them"
            " call in (--listen HOST:PORT), or tune on this machine alone (--data FILE)"
        )
    if asked.only_plan:
        print_plan(config, task, reach, asked.output)
        return
    model = asked.model or config.model
    out = prompt_path(config, asked.output.prompt, model)
    scorer = load_model(model, **asked.engine) if model else None
    output = replace(asked.output, prompt=out)
    Tuning(config, task, scorer, asked.observers, output, asked.fresh).over(reach)
