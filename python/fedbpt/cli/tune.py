"""``fedbpt tune``: coordinate a run over devices, or tune on this machine only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fedbpt.cli.devices import DEFAULT_REGISTRY
from fedbpt.cli.hand_over import Coordinator, HandOver
from fedbpt.cli.local_run import Files, InlineSettings
from fedbpt.cli.observe import Observers
from fedbpt.cli.options import (
    AdminToken,
    AllowInsecure,
    AllowMetrics,
    AsJson,
    Ca,
    Cert,
    ClientCerts,
    CoordinatorUrl,
    Dashboard,
    DashboardToken,
    GpuLayers,
    GpuName,
    Key,
    Questions,
    Quiet,
    Registry,
    Threads,
    allow_metrics,
)
from fedbpt.cli.reach import Reach
from fedbpt.cli.tuning import Output, Tuning, print_plan, print_plan_here, prompt_path
from fedbpt.coordinator.one_machine import NAME
from fedbpt.device.device import Device
from fedbpt.engine.native_scorer import load_model
from fedbpt.errors import ConfigError
from fedbpt.net.tls import Tls
from fedbpt.plain_text import echo
from fedbpt.runs.run_file import load_config

RunFile = Annotated[
    Path | None,
    typer.Argument(help="The run file (TOML): task, devices, settings. Not needed with --data.", show_default=False),
]
Data = Annotated[
    Path | None, typer.Option("--data", "-d", help="Training rows, to tune on this machine only, without devices.")
]
Dev = Annotated[Path | None, typer.Option("--dev", help="With --data: rows for the accuracy shown during the run.")]
Test = Annotated[Path | None, typer.Option("--test", help="With --data: rows for the final accuracy only.")]
OwnTask = Annotated[str | None, typer.Option("--task", "-t", help="Without a run file: the task's name or file.")]
OwnRun = Annotated[
    str | None, typer.Option("--run", help="Without a run file: the run's name in the store. Default: the task's.")
]
OwnStore = Annotated[
    Path | None, typer.Option("--store", help="Without a run file: the run database. Default: runs/runs.db.")
]
Evaluations = Annotated[
    int | None, typer.Option(min=1, help="Without a run file: number of candidates to score. Default: 1600.")
]
Seconds = Annotated[float | None, typer.Option(min=0, help="Without a run file: time limit in seconds.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Without a run file: seed of all randomness. Default: 0.")]
Addresses = Annotated[
    list[str] | None, typer.Option("--device", help="A device's address, in addition to the run file's; repeatable.")
]
PromptFile = Annotated[Path | None, typer.Option("--out", "-o", help="Where to write the tuned prompt.")]
OwnModel = Annotated[
    str | None, typer.Option("--model", "-m", help="The model; with devices, the one they use, to write the prompt.")
]
Listen = Annotated[
    str | None, typer.Option("--listen", help="HOST:PORT where enrolled devices call in; --device adds others.")
]
Expect = Annotated[
    int | None,
    typer.Option(min=1, help="Number of calling devices to wait for. Default: all that are enrolled or invited."),
]
Tokens = Annotated[
    Path | None, typer.Option("--tokens", help='File of devices\' tokens: TOML lines "ADDRESS" = "TOKEN".')
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Start over; the stored run is replaced when the first round closes.")
]
Log = Annotated[Path | None, typer.Option("--log", help="Append events to this file, one JSON object per line.")]
Monitor = Annotated[
    str | None, typer.Option("--monitor", help="HOST:PORT to serve run state, events and Prometheus metrics at.")
]
MonitorToken = Annotated[
    Path | None,
    typer.Option("--monitor-token", help="Token file that the monitor's clients must match; created if absent."),
]
OnlyPlan = Annotated[
    bool, typer.Option("--plan", help="Query the devices, print an upper bound of the run's cost, and exit.")
]
Detach = Annotated[
    bool, typer.Option("--detach", help="With --coordinator: hand the run in, print its state, and exit.")
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
    allow_metric: AllowMetrics = None,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    gpu: GpuName = None,
    device: Addresses = None,
    prompt_file: PromptFile = None,
    listen: Listen = None,
    expect: Expect = None,
    registry: Registry = DEFAULT_REGISTRY,
    tokens: Tokens = None,
    coordinator: CoordinatorUrl = None,
    admin_token: AdminToken = None,
    detach: Detach = False,
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
    """Tune over devices, or on this machine only. Ctrl-C loses at most one round: the same command resumes.

    With --coordinator, a `fedbpt coordinator` runs it over its devices; Ctrl-C only stops following it.

    Example: fedbpt tune --model smollm2-135m --task support.toml --data train.csv --test test.csv
    """
    if coordinator is not None:
        _reject_with_coordinator(
            {
                "--data": data,
                "--dev": dev,
                "--test": test,
                "--allow-metric": allow_metric,
                "--device": device,
                "--listen": listen,
                "--tokens": tokens,
                "--client-certs": client_certs,
                "--store": store,
                "--plan": only_plan,
                "--log": log,
                "--monitor": monitor,
                "--monitor-token": monitor_token,
                "--dashboard": dashboard,
                "--dashboard-token": dashboard_token,
                "--registry": registry != DEFAULT_REGISTRY,
                "--questions": questions,
            }
        )
    given = _Options(
        run_file,
        model,
        InlineSettings(task, run, store, evaluations, seconds, seed),
        Reach(device or (), tokens, listen, expect, registry, Tls(cert, key, ca, client_certs), allow_insecure),
        Observers(log, monitor, monitor_token, Tls(cert, key), allow_insecure, dashboard, dashboard_token),
        Output(prompt_file, questions, as_json, quiet),
        {"n_threads": threads, "n_gpu_layers": gpu_layers, "gpu": gpu},
        fresh,
        only_plan,
        allow_metric,
    )
    if coordinator is not None:
        _hand_over(given, Coordinator(coordinator, admin_token, Tls(cert, key, ca), allow_insecure), detach)
    elif admin_token or detach:
        raise ConfigError(
            "--admin-token and --detach need --coordinator, which runs the run: give its address, or omit them",
            field="--admin-token" if admin_token else "--detach",
        )
    elif data is not None:
        _tune_here(given, Files(data, dev, test))
    elif dev or test:
        raise ConfigError(
            "--dev and --test need --data, on this machine: devices have their own rows",
            field="--dev" if dev else "--test",
        )
    elif allow_metric:
        raise ConfigError(
            "--allow-metric needs --data, on this machine: give it to the devices, which measure answers",
            field="--allow-metric",
        )
    else:
        _tune_over_devices(given)


def _reject_with_coordinator(values: Mapping[str, object]) -> None:
    for option, value in values.items():
        if value:
            raise ConfigError(
                f"{option} cannot be combined with --coordinator, whose machine has the run's devices, store and log:"
                f" omit {option}",
                field=option,
            )


@dataclass(frozen=True)
class _Options:
    run_file: Path | None
    model: str | None
    inline: InlineSettings
    reach: Reach
    observers: Observers
    output: Output
    engine: Mapping[str, Any]  # arguments of `load_model`
    fresh: bool
    only_plan: bool
    allow_metric: list[str] | None


def _tune_here(given: _Options, files: Files) -> None:
    if given.reach.addresses or given.reach.listen:
        raise ConfigError("--data runs on this machine: omit it, or --device and --listen", field="--data")
    config, task = given.inline.config(given.run_file, given.model)
    allow_metrics(given.allow_metric, task)
    rows = files.rows(task)  # before the model, to report a wrong file early
    if not (given.output.quiet or given.output.as_json):
        for line in files.warnings(task, rows):
            echo(f"hint: {line}", err=True)
    out = prompt_path(config, given.output.prompt, config.model)
    scorer = load_model(str(config.model), **given.engine)
    if given.only_plan:
        print_plan_here(config, task, Device(NAME, scorer, *rows, task=task), given.output.as_json)
        return
    output = replace(given.output, prompt=out, questions=given.output.questions or files.test)
    Tuning(config, task, scorer, given.observers, output, given.fresh).run_here(rows)


def _tune_over_devices(given: _Options) -> None:
    if given.run_file is None:
        raise ConfigError(
            "give a run file (fedbpt tune run.toml), or tune on this machine only with --model, --task and --data",
            field="run_file",
        )
    given.inline.reject_with(given.run_file)
    config, task = load_config(given.run_file)
    reach = replace(given.reach, addresses=[*config.devices, *given.reach.addresses])
    if not (reach.addresses or reach.listen):
        raise ConfigError(
            f"no devices: name them in {given.run_file} (devices = [...]) or with --device http://HOST:PORT, let them"
            " call in (--listen HOST:PORT), or tune on this machine only (--data FILE)",
            field="devices",
        )
    if given.only_plan:
        print_plan(config, task, reach, given.output)
        return
    model = given.model or config.model
    out = prompt_path(config, given.output.prompt, model)
    scorer = load_model(model, **given.engine) if model else None
    output = replace(given.output, prompt=out)
    Tuning(config, task, scorer, given.observers, output, given.fresh).run_over(reach)


def _hand_over(given: _Options, coordinator: Coordinator, detach: bool) -> None:
    config, task = given.inline.config_to_hand_in(given.run_file, given.model)
    output = replace(given.output, prompt=prompt_path(config, given.output.prompt, config.model))
    coordinator.connected().close()  # before the model, to report a wrong address or token file early
    scorer = load_model(config.model, **given.engine) if config.model else None
    HandOver(config, task, scorer, output, given.reach.expect, given.fresh, detach).to(coordinator)
