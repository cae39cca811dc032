"""A run's outcome does not depend on how its devices are reached."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from fedbpt.coordinator.clients import DeviceClient, HttpClient, InProcessClient
from fedbpt.coordinator.federation import Federation
from fedbpt.device.agent import AgentService
from fedbpt.device.agent.server import AgentServer
from fedbpt.device.device import Device
from fedbpt.runs.result import RunResult
from fedbpt.runs.store import RunStore
from tests.support.caller import called_by
from tests.support.toy_scene import settings
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows

SETTINGS = settings(rounds=3, method="fedbpt", iterations=2, quorum=1.0, stragglers=0.0, deadline_s=60.0)


def device(name: str) -> Device:
    data = rows(12, first=12 * ord(name))
    return Device(name, ToyScorer(), data, [], data[:4], task=TASK)


def tuned(path: Path, clients: list[DeviceClient]) -> RunResult:
    with RunStore(path) as store:
        return Federation(clients, TASK, SETTINGS, SETTINGS.aggregator(), store, "r").run()


def test_the_same_devices_give_the_same_digest_by_every_transport_and_mixed(tmp_path: Path) -> None:
    near = tuned(tmp_path / "in_process", [InProcessClient(device(name)) for name in "ab"])
    with ExitStack() as stack:
        servers = [stack.enter_context(AgentServer(AgentService(device(name)))) for name in "ab"]
        http = tuned(tmp_path / "http", [HttpClient(s.url, n) for s, n in zip(servers, "ab", strict=True)])
        office = stack.enter_context(called_by(tmp_path, device("b"), device("a")))
        mail = tuned(tmp_path / "mailbox", [office.client(name) for name in office.present()])
        mixed = tuned(tmp_path / "mixed", [HttpClient(servers[0].url, "a"), office.client("b")])
    assert near.digest == http.digest == mail.digest == mixed.digest
    assert near.tuned == http.tuned == mail.tuned == mixed.tuned
    assert {result.rounds for result in (near, http, mail, mixed)} == {3}
