"""Stores of an earlier version, from before the package was split: they are read, and their runs continue.

``tests/support/stores`` was written by that version with the settings below, stopped after two of four rounds of the
search. FedAvg computes the same bits on every processor, so its rounds are replayed and its run continued; the
exponential in CMA-ES may differ.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from fedbpt.coordinator.clients import InProcessClient
from fedbpt.coordinator.federation import Federation
from fedbpt.device.device import Device
from fedbpt.protocol import codec
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore
from tests.support.toy_scene import settings
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows
from tests.unit.coordinator.test_federation_fit import SETTINGS, TEST

STORES = Path(__file__).parents[2] / "support" / "stores"


def stored(method: str, folder: Path) -> Path:
    path = folder / "runs.sqlite"
    path.write_bytes(gzip.decompress((STORES / f"{method}.sqlite.gz").read_bytes()))
    return path


def asked(method: str) -> RunSettings:
    changes: dict[str, Any] = {"method": method, "iterations": 2, "evaluate_every": 2, "rounds": 4}
    return settings(**{**SETTINGS, **changes})


@pytest.mark.parametrize("method", ["pooled", "fedavg"])
def test_settings_and_rounds_are_read_as_written(method: str, tmp_path: Path) -> None:
    with RunStore(stored(method, tmp_path)) as store:
        [found] = store.list_runs()
        assert codec.decode(found.settings, RunSettings) == asked(method)
        rounds = list(store.rounds(found.run))
        assert [each.round for each in rounds] == list(range(len(rounds)))
        assert all({report.device for report in each.reports} == {"a", "b"} for each in rounds)


def test_its_run_continues_to_the_end(tmp_path: Path) -> None:
    shares = {"a": rows(12), "b": rows(14, 50)}
    devices = [Device(name, ToyScorer(), mine, mine[:4], TEST[name], task=TASK) for name, mine in shares.items()]
    with RunStore(stored("fedavg", tmp_path)) as store:
        before = [each.state_digest for each in store.rounds("r")]
        chosen = asked("fedavg")
        clients = [InProcessClient(device) for device in devices]
        result = Federation(clients, TASK, chosen, chosen.aggregator(), store, "r").run()
        assert result.rounds == 4
        assert [each.state_digest for each in store.rounds("r")][: len(before)] == before
