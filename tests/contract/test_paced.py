"""Devices that are told when to call, over real sockets: a run with drafts, its resumption, and older devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedbpt.coordinator import call_times
from fedbpt.coordinator.clients import mailbox
from fedbpt.coordinator.clients.mailbox import Mailbox
from fedbpt.coordinator.enrolment import DeviceRegistry
from fedbpt.coordinator.federation import Federation
from fedbpt.coordinator.server import CoordinatorServer
from fedbpt.device.agent import AgentService, poller
from fedbpt.device.agent.calls import enrol
from fedbpt.device.agent.poller import Poller
from fedbpt.protocol.polling import PACED_HEADER
from fedbpt.runs.events import DeviceLost, Event, RoundClosed
from fedbpt.runs.result import RunResult
from fedbpt.runs.store import RunStore
from tests.support.caller import wait_until
from tests.support.fake_device import FakeDevice
from tests.support.toy_scene import StopRunError, ToyTask, settings

pytestmark = pytest.mark.slow

NAMES = [f"d{i}" for i in range(12)]
SETTINGS = settings(rounds=6, per_round=1, over_selection=0.0, stragglers=0.0, deadline_s=60.0, quorum=0.5)


@pytest.fixture
def paused(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The devices that were told to call later; in a fleet of twelve, and also for a short time."""
    monkeypatch.setattr(call_times, "HELD_POLLS", 2)
    monkeypatch.setattr(call_times, "MIN_PAUSE_S", 0.1)
    monkeypatch.setattr(call_times, "FIRST_ROUND_S", 0.5)
    monkeypatch.setattr(mailbox, "poll_s", lambda _n_devices: 0.1)  # calls are decided on when a poll ends
    monkeypatch.setattr(poller, "POLL_S", (0.1, 25.0))
    told: set[str] = set()
    pause = Mailbox.pause

    def noted(box: Mailbox, seconds: float) -> None:
        told.add(box.device)
        pause(box, seconds)

    monkeypatch.setattr(Mailbox, "pause", noted)
    return told


@contextmanager
def called_by(folder: Path, older: frozenset[str] = frozenset()) -> Iterator[CoordinatorServer]:
    """A server that twelve devices poll; those in ``older`` do not know of call times."""
    with ExitStack() as stack:
        registry = stack.enter_context(DeviceRegistry(folder / "devices.db"))
        server = stack.enter_context(CoordinatorServer(registry))
        for name in NAMES:
            service = AgentService(FakeDevice(name, slow_s=0.3))
            calling = Poller(service, enrol(server.url, registry.invite(name)), pauses_s=(0.02, 0.2))
            if name in older:
                del calling._options["headers"][PACED_HEADER]
            stack.enter_context(calling)
        wait_until(lambda: len(server.present()) == len(NAMES))
        yield server


def tuned(server: CoordinatorServer, store: Path, events: list[Any], stop_after: int | None = None) -> RunResult:
    def hear(event: Event) -> None:
        events.append(event)
        if isinstance(event, RoundClosed) and event.round == stop_after:
            raise StopRunError

    clients = [server.client(name) for name in NAMES]
    with RunStore(store) as opened:
        return Federation(clients, ToyTask(), SETTINGS, SETTINGS.aggregator(), opened, "r", hear).run()


def test_paced_devices_complete_a_run_and_none_counts_as_lost(tmp_path: Path, paused: set[str]) -> None:
    events: list[Any] = []
    with called_by(tmp_path) as server:
        result = tuned(server, tmp_path / "runs.db", events)
        assert server.present() == sorted(NAMES)
    assert result.rounds == 6
    assert len(paused) > 3
    assert [event for event in events if isinstance(event, DeviceLost)] == []
    assert result.tuned.n == 20 * len(NAMES)  # all have evaluated it: they are called, paced or not


def test_a_paced_run_resumes_from_its_committed_rounds(tmp_path: Path, paused: set[str]) -> None:
    events: list[Any] = []
    with called_by(tmp_path) as server:
        with pytest.raises(StopRunError):
            tuned(server, tmp_path / "runs.db", events, stop_after=3)
        with RunStore(tmp_path / "runs.db") as store:
            before = [each.state_digest for each in store.rounds("r")]
        assert tuned(server, tmp_path / "runs.db", events).rounds == 6
    with RunStore(tmp_path / "runs.db") as store:
        assert [each.state_digest for each in store.rounds("r")][: len(before)] == before
    assert len(before) == 4
    assert paused
    assert [event for event in events if isinstance(event, DeviceLost)] == []


def test_older_devices_are_held_and_take_part(tmp_path: Path, paused: set[str]) -> None:
    older = frozenset(NAMES[::2])
    events: list[Any] = []
    with called_by(tmp_path, older) as server:
        result = tuned(server, tmp_path / "runs.db", events)
    assert result.rounds == 6
    assert paused
    assert not paused & older
    assert [event for event in events if isinstance(event, DeviceLost)] == []
