"""Stores of an earlier version, from before the package was split: they are read, and their runs continue.

``tests/support/stores`` was written by that version with the settings below, stopped after two of four rounds of the
search. FedAvg computes the same bits on every processor, so its rounds are replayed and its run continued; the
exponential in CMA-ES may differ. That version had readouts of words only.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fedbpt.coordinator.clients import InProcessClient
from fedbpt.coordinator.federation import Federation
from fedbpt.device.device import Device
from fedbpt.errors import ConfigError
from fedbpt.runs.result import RunResult
from fedbpt.runs.settings import RunSettings, stored_settings
from fedbpt.runs.store import RunStore
from tests.support.raises import raises
from tests.support.toy_scene import settings
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows
from tests.unit.coordinator.test_federation_fit import SETTINGS, TEST

STORES = Path(__file__).parents[2] / "support" / "stores"


def stored(method: str, folder: Path) -> Path:
    path = folder / "runs.sqlite"
    path.write_bytes(gzip.decompress((STORES / f"{method}.sqlite.gz").read_bytes()))
    return path


def asked(method: str, **more: Any) -> RunSettings:
    changes: dict[str, Any] = {"method": method, "iterations": 2, "evaluate_every": 2, "rounds": 4}
    changes["draft"] = "permutation"  # as it was
    return settings(**{**SETTINGS, **changes, **more})


@pytest.mark.parametrize("method", ["pooled", "fedavg"])
def test_settings_and_rounds_are_read_as_written(method: str, tmp_path: Path) -> None:
    with RunStore(stored(method, tmp_path)) as store:
        [found] = store.list_runs()
        assert stored_settings(found.settings) == asked(method, check_devices=False)
        rounds = list(store.rounds(found.run))
        assert [each.round for each in rounds] == list(range(len(rounds)))
        assert all({report.device for report in each.reports} == {"a", "b"} for each in rounds)


def resumed(store: RunStore, chosen: RunSettings) -> RunResult:
    shares = {"a": rows(12), "b": rows(14, 50)}
    devices = [Device(name, ToyScorer(), mine, mine[:4], TEST[name], task=TASK) for name, mine in shares.items()]
    clients = [InProcessClient(device) for device in devices]
    return Federation(clients, TASK, chosen, chosen.aggregator(), store, "r").run()


@pytest.mark.parametrize("readout", ["auto", "words"])
def test_its_run_continues_to_the_end_and_reads_words(readout: str, tmp_path: Path) -> None:
    with RunStore(stored("fedavg", tmp_path)) as store:
        before = [each.state_digest for each in store.rounds("r")]
        chosen = asked("fedavg", readout=readout)
        result = resumed(store, chosen)
        assert result.rounds == 4
        assert [each.state_digest for each in store.rounds("r")][: len(before)] == before
        assert (set(result.fits), result.layer_fits) == ({"calibration", "probe", "readout"}, {})
        assert result.settings.readout == "words"
        n_rounds = store.get_run("r").n_rounds
        assert resumed(store, chosen) == result
        assert resumed(store, msgspec.structs.replace(chosen, rounds=5)).rounds == 5
        assert store.get_run("r").n_rounds > n_rounds


def test_it_is_not_continued_with_hidden_states(tmp_path: Path) -> None:
    with RunStore(stored("fedavg", tmp_path)) as store, raises(ConfigError, field="run"):
        resumed(store, asked("fedavg", readout="layers"))
