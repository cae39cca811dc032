"""A federation of toy models, natively and on Flower: the same names, rows and settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flwr.app import Context

from fedbpt.coordinator.clients import InProcessClient
from fedbpt.coordinator.federation import Federation
from fedbpt.device.device import Device
from fedbpt.device.state import DeviceState
from fedbpt.protocol.specs import ObjectiveSpec
from fedbpt.runs.result import RunResult
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore
from tests.support.toy_scene import settings as toy_settings
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows


def settings(**changes: Any) -> RunSettings:
    """Settings with all stages: selection, calibration, search and readout."""
    objective = ObjectiveSpec(readout_words=4, batch_size=4)
    asked = {"rounds": 3, "objective": objective, "calibrate": True, "quorum": 1.0, "stragglers": 0.0, "iterations": 2}
    return toy_settings(**{**asked, "deadline_s": 300.0, **changes})


def short(**changes: Any) -> RunSettings:
    """Settings with few messages, because each takes long: selection and search."""
    return settings(**{"calibrate": False, "objective": ObjectiveSpec(readout_words=0, batch_size=4), **changes})


def device(number: int, state: DeviceState | None = None) -> Device:
    data = rows(12, first=12 * number)
    return Device(f"node-{number}", ToyScorer(), data, data[4:8], data[:4], task=TASK, state=state)


def make_device(context: Context, state: DeviceState) -> Device:
    """The device of a node, by its number in Flower's simulation."""
    return device(int(str(context.node_config["partition-id"])), state)


def natively(path: Path, n_devices: int, asked: RunSettings) -> RunResult:
    with RunStore(path) as store:
        clients = [InProcessClient(device(number)) for number in range(n_devices)]
        return Federation(clients, TASK, asked, asked.aggregator(), store, "r").run()
