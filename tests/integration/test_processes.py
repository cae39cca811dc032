"""Device processes over real sockets: slow, killed, absent, restarted; a coordinator that is stopped or killed."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from fedbpt.aggregation.pooled import Pooled
from fedbpt.coordinator.clients import HttpClient
from fedbpt.coordinator.federation import Federation
from fedbpt.runs.events import DeviceBack, DeviceLost, Event, RoundClosed
from fedbpt.runs.result import RunResult
from fedbpt.runs.store import RunStore
from tests.integration.processes import Fleet
from tests.support.toy_scene import ToyTask, settings


class Coordinator:
    """A federation in this process with devices in others."""

    def __init__(self, path: Path, urls: list[str]) -> None:
        self.path = path
        self.urls = urls
        self.events: list[Event] = []
        self.at_round: dict[int, Any] = {}

    def run(self, **changes: Any) -> RunResult:
        chosen = settings(**{"rounds": 8, "deadline_s": 10.0, **changes})

        def hear(event: Event) -> None:
            self.events.append(event)
            if isinstance(event, RoundClosed) and event.round in self.at_round:
                self.at_round.pop(event.round)()

        clients = [HttpClient(url, name=f"device-{i}", retry_s=0.5) for i, url in enumerate(self.urls)]
        with RunStore(self.path) as store:
            return Federation(clients, ToyTask(), chosen, Pooled(4, popsize=6, seed=3), store, "r", hear).run()

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def test_three_devices_tune_over_http(fleet: Fleet, tmp_path: Path) -> None:
    devices = fleet.devices(("a",), ("b",), ("c",))
    coordinator = Coordinator(tmp_path / "s", [url for _, url in devices])
    result = coordinator.run(rounds=30)
    assert result.tuned.accuracy > result.zero_shot.accuracy
    assert all(device.reports == 31 and device.bytes_up and device.bytes_down for device in result.devices)
    assert not coordinator.of(DeviceLost)
    for process, _ in devices:
        process.send_signal(signal.SIGINT)
    for process, _ in devices:
        assert process.wait(5) == 0
        assert process.communicate()[1] == ""


def test_a_slow_device_delays_by_its_deadline_only(fleet: Fleet, tmp_path: Path) -> None:
    devices = fleet.devices(("a",), ("b",), ("c", "--slow", "3"))
    coordinator = Coordinator(tmp_path / "s", [url for _, url in devices])
    began = time.monotonic()
    result = coordinator.run(deadline_s=1.0)
    assert time.monotonic() - began < 6
    assert result.rounds == 8
    assert [device.reports for device in result.devices[:2]] == [9, 9]
    first, second = coordinator.of(RoundClosed)[:2]
    assert first.missing == ("device-2",)
    assert 1.0 <= first.seconds < 2.0
    assert second.seconds - first.seconds < 1.0
    assert result.tuned.n == 60  # its old round was cancelled, so it evaluates


def test_a_device_killed_in_mid_round_is_lost_and_comes_back_when_restarted(fleet: Fleet, tmp_path: Path) -> None:
    devices = fleet.devices(("a", "--slow", "0.2"), ("b", "--slow", "0.2"), ("c", "--slow", "0.2"))
    victim, url = devices[2]
    coordinator = Coordinator(tmp_path / "s", [url for _, url in devices])

    def kill() -> None:
        victim.kill()
        victim.wait()

    def restart() -> None:
        fleet.spawn("tests.integration.toy_device", "c", "--port", url.rsplit(":", 1)[1])

    coordinator.at_round = {2: kill, 4: restart}
    result = coordinator.run(rounds=25)
    lost = coordinator.of(DeviceLost)
    assert lost[0].device == "device-2"
    assert lost[0].reason
    assert coordinator.of(DeviceBack)
    assert 4 < result.devices[2].reports < 25
    assert coordinator.of(RoundClosed)[-1].missing == ()
    assert result.tuned.n == 60


def test_a_device_dead_from_the_start_is_named_and_the_run_continues(fleet: Fleet, tmp_path: Path) -> None:
    (_, first), (_, second) = fleet.devices(("a",), ("b",))
    coordinator = Coordinator(tmp_path / "s", [first, second, "http://127.0.0.1:9"])
    began = time.monotonic()
    result = coordinator.run()
    assert time.monotonic() - began < 5
    (lost,) = coordinator.of(DeviceLost)
    assert (lost.device, result.devices[2].reports) == ("device-2", 0)
    assert lost.reason


def test_a_port_in_use_is_a_one_line_error(fleet: Fleet) -> None:
    ((_, url),) = fleet.devices(("a",))
    port = url.rsplit(":", 1)[1]
    out, err = fleet.spawn("tests.integration.toy_device", "b", "--port", port).communicate(timeout=20)
    assert out == ""
    assert len(err.splitlines()) == 1
    assert port in err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_coordinator_resumes_to_the_digest_of_an_uninterrupted_run(
    fleet: Fleet, tmp_path: Path, how: signal.Signals
) -> None:
    urls = [url for _, url in fleet.devices(("a", "--slow", "0.1"), ("b", "--slow", "0.1"), ("c", "--slow", "0.1"))]
    interrupted = str(tmp_path / "interrupted")
    coordinator = fleet.spawn("tests.integration.toy_coordinator", interrupted, "8", *urls)
    assert coordinator.stdout is not None
    for line in coordinator.stdout:
        if line.strip() == "RoundClosed 3":
            break
    time.sleep(0.05)  # in the middle of round 4
    coordinator.send_signal(how)
    code = coordinator.wait(10)
    if how == signal.SIGINT:
        assert code == 130
        with RunStore(interrupted) as store:
            assert store.get_run("r").status == "stopped"

    resumed = Coordinator(Path(interrupted), urls).run()
    assert resumed.rounds == 8
    assert resumed.digest == Coordinator(tmp_path / "whole", urls).run().digest
