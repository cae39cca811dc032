"""Devices that call in over a faulty network: the run ends with the digest of the run without faults."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from fedbpt.coordinator.clients import InProcessClient
from fedbpt.coordinator.devices.enrolment import DeviceRegistry
from fedbpt.coordinator.federation import Federation
from fedbpt.coordinator.service.server import CoordinatorServer
from fedbpt.device.agent import AgentService
from fedbpt.device.agent.calls import enrol
from fedbpt.device.agent.poller import Poller
from fedbpt.device.device import Device
from fedbpt.runs.result import RunResult
from fedbpt.runs.store import RunStore
from tests.faults.conftest import ALL
from tests.faults.proxy import FAULTS, Fault, FaultProxy
from tests.support.caller import wait_until
from tests.support.toy_scene import settings
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SETTINGS = settings(rounds=8, method="pooled", popsize=6, quorum=1.0, stragglers=0.0, deadline_s=900.0)


def device(name: str) -> Device:
    data = rows(12, first=12 * ord(name))
    return Device(name, ToyScorer(), data, [], data[:4], task=TASK)


def tuned(path: Path, clients: list[InProcessClient]) -> RunResult:
    with RunStore(path) as store:
        return Federation(clients, TASK, SETTINGS, SETTINGS.aggregator(), store, "r").run()


@pytest.mark.parametrize("fault", FAULTS if ALL else ["duplicate", "unacknowledged", "stall"])
def test_a_network_that_fails_and_recovers_changes_nothing(
    tmp_path: Path, proxy: Callable[..., FaultProxy], fault: Fault
) -> None:
    expected = tuned(tmp_path / "near.db", [InProcessClient(device(name)) for name in "ab"])
    stop = threading.Event()
    with ExitStack() as stack:
        registry = stack.enter_context(DeviceRegistry(tmp_path / "devices.db"))
        server = stack.enter_context(CoordinatorServer(registry))
        bad = proxy(server.url)
        for name in "ab":
            credentials = enrol(bad.url, registry.invite(name))
            poller = Poller(AgentService(device(name)), credentials, pauses_s=(0.02, 0.2), tell=lambda _line: None)
            stack.enter_context(poller)
        wait_until(lambda: len(server.present()) == 2)

        def shake() -> None:
            """Alternate between 0.6 s of the fault and none; for long after a stall, which only a timeout notices."""
            while not stop.wait(0.4):
                bad.fault = fault
                stop.wait(0.6)
                bad.fault = "none"
                stop.wait(12.0 if fault == "stall" else 0.0)

        shaking = threading.Thread(target=shake)
        shaking.start()
        try:
            result = tuned(tmp_path / "far.db", [server.client(name) for name in "ab"])
        finally:
            stop.set()
            shaking.join()
            bad.fault = "none"
    assert (result.digest, result.tuned) == (expected.digest, expected.tuned)
    assert bad.broken > 0
