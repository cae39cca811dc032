"""The Flower App of ``app/``: makes a run and devices from its ``pyproject.toml`` and the nodes' configurations."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

import msgspec
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedbpt import tasks
from fedbpt.decoders import from_builtins
from fedbpt.device.device import Device
from fedbpt.device.state import DeviceState
from fedbpt.engine.native_scorer import load_model
from fedbpt.engine.scorer import Scorer
from fedbpt.errors import ConfigError, FedbptError
from fedbpt.flower.device import client_app
from fedbpt.flower.strategy import FIND_S, FedBPT
from fedbpt.machine.folders import expanded
from fedbpt.metrics import allow_metric
from fedbpt.plain_text import echo
from fedbpt.protocol.specs import as_name
from fedbpt.runs.events import DeviceBack, DeviceLost, Evaluated, Event, RoundClosed, RunFinished
from fedbpt.runs.result import UNSCORED
from fedbpt.runs.run_file import with_defaults
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore
from fedbpt.tasks import Row, Task
from fedbpt.tasks.partition import Scheme

SIMULATED: Final = "partition-id"
"""Key of a node's share of files that nodes have in common; set by Flower's simulation, or by hand."""


class AppConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, rename="kebab"):
    """The configuration explained in ``app/pyproject.toml``, and a node's ``name`` and ``state`` file."""

    task: str
    run: str = "flower"
    store: str = "~/.fedbpt/flower.db"
    devices: int = 0
    find_s: float = FIND_S
    settings: dict[str, Any] = {}

    model: str = ""
    data: str = ""
    test: str = ""
    dev: str = ""
    threads: int = 0
    partition: Scheme = "iid"
    alpha: float = 1.0
    partition_id: int | None = None
    num_partitions: int = 1
    name: str = ""
    state: str = ""


def config_of(*sources: Mapping[str, Any]) -> AppConfig:
    """Merge Flower's flat configurations (``settings.rounds``); later sources take precedence. Raises `ConfigError`."""
    nested: dict[str, Any] = {}
    for key, value in (item for source in sources for item in source.items()):
        *path, last = key.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    try:
        return from_builtins(nested, AppConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the Flower App's configuration: {error}") from error


def settings_of(config: AppConfig, task: Task) -> RunSettings:
    """The run's settings, with defaults that depend on the task. Raises `ConfigError`."""
    try:
        return from_builtins(with_defaults(config.settings, task), RunSettings)
    except msgspec.ValidationError as error:
        cause = error.__cause__
        reason = cause if isinstance(cause, FedbptError) else error
        raise ConfigError(f"the Flower App's configuration, settings: {reason}") from error


# --- the server ------------------------------------------------------------------------------------------------------

server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Tune, or resume a stopped run."""
    config = config_of(context.run_config)
    task = tasks.load(config.task)
    settings = settings_of(config, task)
    with RunStore(expanded(config.store)) as store:
        strategy = FedBPT(
            task, settings, store, config.run, devices=config.devices, find_s=config.find_s, on_event=_print_event
        )
        strategy.start(grid)


def _print_event(event: Event) -> None:
    """Print a line, which Flower adds to its log."""
    match event:
        case RoundClosed():
            lost = f", without {', '.join(event.missing)}" if event.missing else ""
            echo(f"round {event.round} ({event.purpose}): loss {event.loss:.4f}{lost}")
        case Evaluated(round=round, score=score):
            echo(f"round {round}: accuracy {score.accuracy:.3f} on {score.n} dev rows")
        case DeviceLost(device=device, reason=reason):
            echo(f"{device} is lost: {reason}")
        case DeviceBack(device=device):
            echo(f"{device} is back")
        case RunFinished(result=result):
            echo(f"run {result.run}: digest {result.digest} after {result.rounds} rounds")
            if result.tuned.n:
                before = f"zero-shot {result.zero_shot.accuracy:.3f}" if result.zero_shot.n else UNSCORED
                echo(f"accuracy {result.tuned.accuracy:.3f}, {before}")


# --- a node ----------------------------------------------------------------------------------------------------------


def make_device(context: Context, state: DeviceState) -> Device:
    """The device of a node, with its own files or its share of common files."""
    own = dict(context.node_config)
    allowed = own.pop("allow-metric", "")  # of the node alone: the run's configuration may be somebody else's
    config = config_of(context.run_config, own)
    if not (config.model and config.data):
        raise ConfigError(
            "a node needs a model and data: set them in the app's configuration or with --node-config",
            field="data" if config.model else "model",
        )
    rows = [_rows(config, file) if file else [] for file in (config.data, config.dev, config.test)]
    default_name = f"node-{config.partition_id}" if config.partition_id is not None else as_name(socket.gethostname())
    task = tasks.load(config.task)
    if allowed:
        allow_metric(str(allowed))
    scorer = _scorer(config.model, config.threads)
    return Device(config.name or default_name, scorer, *rows, task=task, state=state)


def _rows(config: AppConfig, file: str) -> list[Row]:
    rows = _read(config.task, file)
    if config.partition_id is None:
        return rows
    scheme = config.partition if file == config.data else "iid"
    labels = [label if isinstance(label, int) else 0 for _, label in rows]
    parts = tasks.partition(labels, config.num_partitions, scheme, config.alpha)
    return [rows[i] for i in parts[config.partition_id]]


@lru_cache(maxsize=8)
def _read(task: str, file: str) -> list[Row]:
    return tasks.read_task_rows(tasks.load(task), expanded(file))


@lru_cache(maxsize=1)
def _scorer(model: str, threads: int) -> Scorer:
    """The model, loaded once per process for all of its nodes."""
    return load_model(model, n_threads=threads or None, late=True)


node_app = client_app(make_device)
