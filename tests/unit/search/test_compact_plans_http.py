"""Compact plans over HTTP: a device gets ranks instead of states, or the state if that fails."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedbpt.coordinator.clients import DeviceClient, HttpClient, InProcessClient
from fedbpt.coordinator.federation import Federation
from fedbpt.device.agent import AgentService
from fedbpt.device.agent.server import AgentServer
from fedbpt.device.device import Device
from fedbpt.errors import DeviceRefusedError
from fedbpt.protocol.rounds import RoundPlan
from fedbpt.protocol.specs import PromptSpec
from fedbpt.runs.events import Event, RoundClosed
from fedbpt.runs.result import RunResult
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore
from fedbpt.search.compact_plans import Replayer
from tests.support.toy_scene import settings
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows

pytestmark = pytest.mark.slow

POOLED = settings(rounds=12, method="pooled", popsize=6, prompt=PromptSpec(d=400), quorum=1.0, stragglers=0.0)
LOCAL = settings(rounds=3, method="fedavg", popsize=6, iterations=4, prompt=PromptSpec(d=400), quorum=1.0)


def device() -> Device:
    data = rows(12)
    return Device("a", ToyScorer(), data, [], data[:4], task=TASK)


def tuned(path: Path, client: DeviceClient, chosen: RunSettings, watch: Any = lambda _event: None) -> RunResult:
    with RunStore(path) as store:
        return Federation([client], TASK, chosen, chosen.aggregator(), store, "r", watch).run()


@contextmanager
def served() -> Iterator[HttpClient]:
    with AgentServer(AgentService(device())) as server:
        yield HttpClient(server.url, "a")


@pytest.mark.parametrize(("chosen", "way"), [(POOLED, "bytes_down"), (LOCAL, "bytes_up")])
def test_the_same_run_sends_a_fraction(tmp_path, chosen, way):
    near = InProcessClient(device())
    whole = tuned(tmp_path / "whole", near, chosen)
    with served() as client:
        short = tuned(tmp_path / "short", client, chosen)
    assert short.digest == whole.digest
    assert short.tuned == whole.tuned
    assert getattr(client, way) < getattr(near, way) / 2


def test_a_device_that_forgets_its_search_between_rounds_gets_all_ranks(tmp_path, monkeypatch):
    tell, whole = [], Replayer.whole

    def forgetful(self: Replayer, plan: RoundPlan) -> RoundPlan:
        self._searches.clear()
        tell.append(plan.work)
        return whole(self, plan)

    expected = tuned(tmp_path / "whole", InProcessClient(device()), POOLED)
    monkeypatch.setattr(Replayer, "whole", forgetful)
    with served() as client:
        assert tuned(tmp_path / "short", client, POOLED).digest == expected.digest
    known = [work.known for work in tell if hasattr(work, "known")]
    assert known[:6] == [0, 0, 1, 0, 2, 0]  # the latest ranks are tried first, each time


@pytest.mark.parametrize("code", ["replay-differs", "malformed"])
def test_a_device_that_cannot_replay_is_sent_states_from_then_on(tmp_path, monkeypatch, code):
    asked, whole = [], Replayer.whole

    def unable(self: Replayer, plan: RoundPlan) -> RoundPlan:
        made = whole(self, plan)
        if made is not plan:
            asked.append(plan)
            raise DeviceRefusedError("no", code)
        return made

    expected = tuned(tmp_path / "whole", InProcessClient(device()), POOLED)
    monkeypatch.setattr(Replayer, "whole", unable)
    with served() as client:
        assert tuned(tmp_path / "short", client, POOLED).digest == expected.digest
    assert len(asked) == 1


def test_a_resumed_coordinator_uses_a_search_that_its_device_kept(tmp_path):
    closed: list[int] = []

    def stop(event: Event) -> None:
        if isinstance(event, RoundClosed):
            closed.append(event.round)
            if len(closed) == 6:
                raise KeyboardInterrupt

    expected = tuned(tmp_path / "whole", InProcessClient(device()), POOLED)
    with served() as client:
        with pytest.raises(KeyboardInterrupt):
            tuned(tmp_path / "short", client, POOLED, stop)
        again = HttpClient(client.url, "a")
        assert tuned(tmp_path / "short", again, POOLED).digest == expected.digest
    asyncio.run(again.aclose())


def test_a_report_that_the_coordinator_cannot_repeat_is_fetched_whole(tmp_path, monkeypatch):
    expected = tuned(tmp_path / "whole", InProcessClient(device()), LOCAL)
    monkeypatch.setattr("fedbpt.coordinator.clients.requests.whole_report", lambda _report, _plan: None)
    with served() as client:
        assert tuned(tmp_path / "short", client, LOCAL).digest == expected.digest
