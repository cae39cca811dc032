"""Heartbeats of devices that are called and of devices that call in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from fedbpt.coordinator.clients import DeviceClient, HttpClient, InProcessClient
from fedbpt.coordinator.devices.enrolment import DeviceRegistry
from fedbpt.coordinator.service.server import CoordinatorServer
from fedbpt.dashboard import heartbeat
from fedbpt.dashboard.heartbeat import Heartbeat
from fedbpt.device.agent import AgentService
from fedbpt.device.agent.calls import enrol
from fedbpt.device.agent.poller import Poller
from fedbpt.device.agent.server import AgentServer
from fedbpt.protocol.rounds import DeviceInfo
from tests.support.fake_device import FakeDevice


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "INTERVAL_S", 0.02)


class Watcher:
    """Collects what a heartbeat reports."""

    def __init__(self) -> None:
        self.answers: dict[str, bool] = {}
        self.infos: dict[str, DeviceInfo] = {}

    def until(self, clients: Sequence[DeviceClient], *steps: tuple[Callable[[], None], dict[str, bool]]) -> None:
        """Watch ``clients``; after each step until what is told is what is expected."""
        beats = Heartbeat(clients, self.answers.__setitem__, self.infos.__setitem__)

        async def watch() -> None:
            running = asyncio.ensure_future(beats.run())
            for do, expected in steps:
                await asyncio.to_thread(do)
                while self.answers != expected:
                    assert not running.done()
                    await asyncio.sleep(0.01)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

        asyncio.run(watch())


@pytest.fixture
def server() -> Iterator[AgentServer]:
    with AgentServer(AgentService(FakeDevice("pi5")), "127.0.0.1", 0) as server:
        yield server


def nothing() -> None:
    return None


def test_a_device_that_ends_stops_responding_and_its_status_is_reported(server: AgentServer) -> None:
    client, watcher = HttpClient(server.url, "pi5"), Watcher()
    watcher.until([client], (nothing, {"pi5": True}), (server.stop, {"pi5": False}))
    assert watcher.infos["pi5"].n_train == 16
    assert (client.bytes_up, client.bytes_down) == (0, 0)


def test_a_device_that_calls_in_responds_while_it_polls(tmp_path: Path) -> None:
    with DeviceRegistry(tmp_path / "devices.db") as registry, CoordinatorServer(registry) as coordinator:
        credentials = enrol(coordinator.url, registry.invite("pixel"))
        poller = Poller(AgentService(FakeDevice("pixel")), credentials, pauses_s=(0.02, 0.2))
        client = coordinator.client("pixel")
        Watcher().until(
            [client], (nothing, {"pixel": False}), (poller.start, {"pixel": True}), (poller.stop, {"pixel": False})
        )


def test_devices_in_this_process_are_not_polled() -> None:
    watcher = Watcher()
    client = InProcessClient(FakeDevice("here"))
    watcher.until([client])
    assert watcher.answers == {}
