"""Devices are killed in every round and restarted; clocks jump forwards and backwards: the run still ends."""

from __future__ import annotations

import random
import signal
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from fedbpt.runs.store import RunStore
from tests.faults.conftest import ALL
from tests.faults.coordinator import Coordinator, digest
from tests.integration.processes import Fleet

pytestmark = pytest.mark.timeout(1800 if ALL else 300)

N_DEVICES = 32 if ALL else 4
SHARE = 0.3


def test_a_run_ends_although_a_third_of_the_devices_is_killed_repeatedly(fleet: Fleet, tmp_path: Path) -> None:
    """Each victim is restarted at once, at the same address and without the state of the round."""
    rng = random.Random(3)
    names = [f"d{number}" for number in range(N_DEVICES)]
    started = fleet.devices(*((name, "--slow", "0.1") for name in names))
    processes = [process for process, _ in started]
    urls = [url for _, url in started]
    session = Coordinator(tmp_path / "run", urls, rounds=12 if ALL else 5, quorum=0.3)
    over = threading.Event()
    killed = 0

    def reap() -> None:
        nonlocal killed
        while not over.wait(1.0):
            for victim in rng.sample(range(N_DEVICES), max(1, round(SHARE * N_DEVICES))):
                processes[victim].send_signal(signal.SIGKILL)
                processes[victim].wait()
                port = urlsplit(urls[victim]).port
                arguments = (names[victim], "--port", port, "--slow", "0.1")
                processes[victim] = fleet.spawn("tests.integration.toy_device", *arguments)
                killed += 1

    reaper = threading.Thread(target=reap)
    reaper.start()
    try:
        assert session.wait(1500.0 if ALL else 240.0) == 0
    finally:
        over.set()
        reaper.join()
    assert killed > 0
    with RunStore(tmp_path / "run") as store:
        closed = [line for line in store.history("r") if line.closed]
    assert len(closed) == (13 if ALL else 6)
    assert all(len(line.reported) >= 0.3 * N_DEVICES for line in closed)


def test_a_clock_that_jumps_changes_nothing(fleet: Fleet, tmp_path: Path) -> None:
    urls = [url for _, url in fleet.devices(("a", "--slow", "0.02"), ("b", "--slow", "0.02"))]
    for path, clock_s in ((tmp_path / "right", 0.0), (tmp_path / "wrong", 600.0)):
        assert Coordinator(path, urls, clock_s=clock_s).wait() == 0
    assert digest(tmp_path / "wrong") == digest(tmp_path / "right")
