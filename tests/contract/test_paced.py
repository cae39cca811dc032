"""Devices that are told when to call, over real sockets: a run with drafts, its resumption, and older devices."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedbpt.coordinator.clients import mailbox
from fedbpt.coordinator.clients.mailbox import Mailbox
from fedbpt.coordinator.devices import call_times
from fedbpt.coordinator.devices.call_times import CallTimes
from fedbpt.coordinator.devices.enrolment import DeviceRegistry
from fedbpt.coordinator.federation import Federation
from fedbpt.coordinator.ledger import RunLedger
from fedbpt.coordinator.live import LiveEvaluation
from fedbpt.coordinator.service.server import CoordinatorServer
from fedbpt.device.agent import AgentService, LocalDevice, poller
from fedbpt.device.agent.calls import enrol
from fedbpt.device.agent.poller import Poller
from fedbpt.device.device import Device
from fedbpt.protocol.rounds import RoundReport
from fedbpt.protocol.specs import ObjectiveSpec, PromptSpec
from fedbpt.runs.events import DeviceLost, Evaluated, Event, RoundClosed
from fedbpt.runs.result import RunResult
from fedbpt.runs.settings import RunSettings, stored_settings
from fedbpt.runs.store import RunStore
from fedbpt.tasks import Task
from tests.support.caller import wait_until
from tests.support.fake_device import FakeDevice
from tests.support.toy_scene import D, StopRunError, ToyTask, settings
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows

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
def called_by(
    folder: Path, older: frozenset[str] = frozenset(), devices: Sequence[LocalDevice] | None = None
) -> Iterator[CoordinatorServer]:
    """A server that ``devices`` poll, or twelve fake ones; those in ``older`` do not know of call times."""
    devices = devices or [FakeDevice(name, slow_s=0.3) for name in NAMES]
    with ExitStack() as stack:
        registry = stack.enter_context(DeviceRegistry(folder / "devices.db"))
        server = stack.enter_context(CoordinatorServer(registry))
        for device in devices:
            credentials = enrol(server.url, registry.invite(device.name))
            calling = Poller(AgentService(device), credentials, pauses_s=(0.02, 0.2))
            if device.name in older:
                calling._pace_headers = dict  # type: ignore[method-assign]
            stack.enter_context(calling)
        wait_until(lambda: len(server.present()) == len(devices))
        yield server


def tuned(
    server: CoordinatorServer,
    store: Path,
    events: list[Any],
    stop_after: int | None = None,
    task: Task | None = None,
    settings: RunSettings = SETTINGS,
) -> RunResult:
    def hear(event: Event) -> None:
        events.append(event)
        if isinstance(event, RoundClosed) and event.round == stop_after:
            raise StopRunError

    clients = [server.client(name) for name in server.present()]
    with RunStore(store) as opened:
        return Federation(clients, task or ToyTask(), settings, settings.aggregator(), opened, "r", hear).run()


def test_paced_devices_complete_a_run_and_none_counts_as_lost(tmp_path: Path, paused: set[str]) -> None:
    events: list[Any] = []
    with called_by(tmp_path) as server:
        result = tuned(server, tmp_path / "runs.db", events)
        assert server.present() == sorted(NAMES)
    assert result.rounds == 6
    assert len(paused) > 3
    assert [event for event in events if isinstance(event, DeviceLost)] == []
    assert result.tuned.n == 20 * len(NAMES)  # all have evaluated it: they are called, paced or not


def replayed(path: Path) -> tuple[int, str]:
    """Number of stored rounds, and the digest that they replay to."""
    with RunStore(path) as store:
        settings = stored_settings(store.get_run("r").settings)
        ledger = RunLedger(store, "r", ToyTask(), settings, settings.aggregator())
        return ledger.replay_stored(), ledger.state.aggregator.digest()


def test_a_paced_run_resumes_from_its_committed_rounds(tmp_path: Path, paused: set[str]) -> None:
    events: list[Any] = []
    with called_by(tmp_path) as server:
        with pytest.raises(StopRunError):
            tuned(server, tmp_path / "runs.db", events, stop_after=3)
        assert replayed(tmp_path / "runs.db")[0] == 4
        result = tuned(server, tmp_path / "runs.db", events)
    assert result.rounds == 6
    assert replayed(tmp_path / "runs.db") == (7, result.digest)
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


class SlowDevice(Device):
    """Its rounds last for some polls of the other devices."""

    def run(self, *work: Any) -> RoundReport:
        time.sleep(0.25)
        return super().run(*work)


def test_an_evaluation_within_a_paced_search_is_not_put_off(
    tmp_path: Path, paused: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, pace = LiveEvaluation.measure, CallTimes.__call__
    evaluating = threading.Event()
    put_off: list[str] = []

    async def measured(*given: Any) -> Evaluated | None:
        evaluating.set()
        try:
            return await measure(*given)
        finally:
            evaluating.clear()

    def paced(call_times: CallTimes, device: str) -> float:
        before = evaluating.is_set()
        pause_s = pace(call_times, device)
        if before and evaluating.is_set() and 0.0 < pause_s < math.inf:
            put_off.append(device)
        return pause_s

    monkeypatch.setattr(LiveEvaluation, "measure", measured)
    monkeypatch.setattr(CallTimes, "__call__", paced)
    reads = settings(
        rounds=6, popsize=4, per_round=1, over_selection=0.0, stragglers=0.0, deadline_s=60.0, evaluate_every=2,
        prompt=PromptSpec(d=D, alpha=2.0, seed=3), objective=ObjectiveSpec(batch_size=4, readout_words=6), ensemble=1,
        readout="words",
    )  # fmt: skip
    shares = {name: rows(8, 50 * i) for i, name in enumerate(NAMES[:8])}
    devices = [SlowDevice(name, ToyScorer(), share, share[:4], share[4:], task=TASK) for name, share in shares.items()]
    events: list[Any] = []
    with called_by(tmp_path, devices=devices) as server:
        result = tuned(server, tmp_path / "runs.db", events, task=TASK, settings=reads)
    assert result.rounds == 6
    assert paused
    assert put_off == []
    assert [sorted(event.devices) for event in events if isinstance(event, Evaluated)] == 4 * [list(shares)]
