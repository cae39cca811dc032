"""A budget in seconds ends rounds too: a round that is not done by then is stopped and left out."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedbpt.coordinator.clients import InProcessClient
from fedbpt.coordinator.costs.estimate import readout_tokens, tokens_of
from fedbpt.coordinator.costs.spending import Spending
from fedbpt.coordinator.federation import Federation
from fedbpt.device.agent.service import AgentService
from fedbpt.device.device import Device
from fedbpt.errors import QuorumError, ScoringInterrupted
from fedbpt.protocol.rounds import EvaluateReport, FitWork, PooledWork, RoundPlan, RoundReport
from fedbpt.protocol.specs import ObjectiveSpec, PromptSpec
from fedbpt.runs.events import DeviceBack, DeviceLost, RoundClosed
from fedbpt.runs.settings import RunSettings
from fedbpt.runs.store import RunStore
from tests.contract.test_clients import plan, request
from tests.support.fake_device import FakeDevice
from tests.support.raises import raises
from tests.support.toy_scene import Scene, closed
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows

pytestmark = pytest.mark.slow

SECONDS = 1.5


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path / "runs.db", FakeDevice("a"), FakeDevice("b"))
    with made.store:
        yield made


def limited(**changes: Any) -> dict[str, Any]:
    return {"rounds": 0, "seconds": SECONDS, "quorum": 1.0, "deadline_s": 600.0, **changes}


def hang(*devices: FakeDevice) -> None:
    for device in devices:
        device.gate.clear()


def test_a_generation_that_overruns_is_stopped_and_left_out(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    expected = scene.run("three", rounds=3).digest
    scene.when(closed(3), lambda: hang(*scene.devices.values()))
    with caplog.at_level(logging.WARNING):
        result = scene.run(**limited(rounds=1000))
    assert (result.rounds, result.digest) == (3, expected)
    assert result.seconds >= SECONDS
    assert result.evaluations == 3 * 6
    assert all(device.interrupts for device in scene.devices.values())
    assert not scene.of(DeviceLost) + scene.of(DeviceBack)
    assert result.tuned.n == 40
    assert not [record for record in caplog.records if record.name.startswith("fedbpt")]


def test_a_budget_too_small_for_one_generation_is_logged(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    scene.when(closed(0), lambda: hang(*scene.devices.values()))
    with caplog.at_level(logging.WARNING):
        result = scene.run(**limited(seconds=0.1))
    assert (result.rounds, result.evaluations) == (0, 0)
    assert "first generation" in caplog.text
    assert scene.store.get_run("r").status == "finished"


def test_reports_of_enough_devices_count_when_the_budget_ends(scene: Scene) -> None:
    scene.when(closed(1), lambda: hang(scene.devices["b"]))
    result = scene.run(**limited(quorum=0.5))
    assert [device.reports for device in result.devices] == [3, 2]
    assert scene.of(RoundClosed)[-1].reported == ("a",)
    assert scene.devices["b"].interrupts
    assert not scene.of(DeviceLost)


def test_a_deadline_before_the_end_of_the_budget_is_an_error(scene: Scene) -> None:
    scene.when(closed(1), lambda: hang(*scene.devices.values()))
    with raises(QuorumError) as caught:
        scene.run(**limited(seconds=60.0, deadline_s=0.3))
    assert "0.3 s" in str(caught.value)


def test_the_time_of_a_cut_round_is_spent_and_a_larger_budget_resumes(scene: Scene) -> None:
    scene.when(closed(2), lambda: hang(*scene.devices.values()))
    spent = scene.run(**limited()).seconds
    for device in scene.devices.values():
        device.gate.set()
    assert scene.store.history("r")[3].metrics["cut_seconds"] > 1
    longer = scene.run(rounds=5, quorum=1.0)
    assert longer.seconds > spent
    assert longer.digest == scene.run("whole", rounds=5, quorum=1.0).digest


@pytest.mark.parametrize("purpose", ["calibration", "search"])
def test_a_round_that_is_left_out_is_not_in_the_result(tmp_path: Path, purpose: str) -> None:
    """Calibration, search and readout on a real device, whose rounds for ``purpose`` take longer than the budget."""
    device = Device("a", ToyScorer(), rows(16), [], rows(8, 50), task=TASK)
    work, over = device.run, threading.Event()

    def run(asked: RoundPlan, progress: Callable[[int, int], None], cancelled: Callable[[], bool]) -> RoundReport:
        if purpose == ("search" if isinstance(asked.work, PooledWork) else getattr(asked.work, "purpose", "")):
            assert over.wait(60)
            raise ScoringInterrupted("interrupted")
        return work(asked, progress, cancelled)

    scene = Scene(tmp_path / "runs.db", device)
    device.run, device.interrupt = run, over.set  # type: ignore[method-assign]
    asked = settings(rounds=1000, seconds=0.5)
    with scene.store:
        federation = Federation(
            list(scene.clients.values()), TASK, asked, asked.aggregator(), scene.store, "r", scene.events.append
        )
        result = federation.run()
    closed_for = {event.purpose for event in scene.of(RoundClosed)}
    assert over.is_set()
    assert result.evaluations == 0
    assert set(result.fits) == (set() if purpose == "calibration" else {"calibration"} | (closed_for & {"readout"}))
    assert purpose not in closed_for
    assert result.tuned.n == 8


def test_the_round_after_one_that_is_left_out_has_the_same_number(scene: Scene) -> None:
    """One device is done, the other is not; both then accept another plan for the same round."""
    scene.when(closed(2), lambda: hang(scene.devices["b"]))
    first = scene.run(**limited())
    assert first.rounds == 2
    plans = [[plan.round for plan in device.plans] for device in scene.devices.values()]
    assert plans == [[0, 1, 2, 3], [0, 1, 2, 3]]
    scene.devices["b"].gate.set()
    for client in scene.clients.values():
        assert client.is_idle
    assert scene.run(rounds=4, quorum=1.0).rounds == 4


@pytest.mark.parametrize("n_exchanges", [1, 2])
def test_a_run_whose_calibration_was_cut_short_is_resumed(tmp_path: Path, n_exchanges: int) -> None:
    device = Device("a", ToyScorer(), rows(16), [], rows(8, 50), task=TASK)
    work, over = device.run, threading.Event()
    calibrations: list[RoundPlan] = []

    def run(asked: RoundPlan, progress: Callable[[int, int], None], cancelled: Callable[[], bool]) -> RoundReport:
        if isinstance(asked.work, FitWork) and asked.work.purpose == "calibration":
            calibrations.append(asked)
            if len(calibrations) > n_exchanges and not over.is_set():
                assert over.wait(60)
                raise ScoringInterrupted("interrupted")
        return work(asked, progress, cancelled)

    scene = Scene(tmp_path / "runs.db", device)
    device.run, device.interrupt = run, over.set  # type: ignore[method-assign]
    fits: list[set[str]] = []
    with scene.store:
        for changes in ({"seconds": 0.5}, {"rounds": 1}):
            asked = settings(baselines=True, **changes)
            federation = Federation(list(scene.clients.values()), TASK, asked, asked.aggregator(), scene.store, "r")
            result = federation.run()
            fits.append({*result.fits, *result.layer_fits})
    assert fits == [{"probe"}, {"calibration", "probe", "readout"}]


# --- the readout's share ---------------------------------------------------------------------------------------------


def settings(**changes: Any) -> RunSettings:
    objective = ObjectiveSpec(max_text_tokens=64, readout_words=8)
    given: dict[str, Any] = {"rounds": 2, "popsize": 4, "prompt": PromptSpec(d=4), "objective": objective, **changes}
    return RunSettings(**given)


def test_the_readouts_tokens_are_predicted_from_the_calibrations() -> None:
    device = Device("a", ToyScorer(), rows(40), task=TASK)
    asked = settings()
    with RunStore(":memory:") as store:
        federation = Federation([InProcessClient(device)], TASK, asked, asked.aggregator(), store, "r")
        federation.run()
        spent = federation._ledger.spending.tokens_for
    at_most = readout_tokens(asked, TASK.templates, [device.info()], 0)
    foretold = readout_tokens(asked, TASK.templates, [device.info()], spent["calibration"])
    parts = tokens_of(asked, TASK.templates, device.info())
    assert at_most == parts.fit.total + parts.others.total
    assert spent["readout"] <= at_most
    assert 0.6 < spent["readout"] / foretold < 1.6 < at_most / spent["readout"]


def test_without_a_readout_no_budget_is_reserved_for_it() -> None:
    info = Device("a", ToyScorer(), rows(40), task=TASK).info()
    bare = settings().for_labels(())
    assert readout_tokens(bare, TASK.templates, [info], 100) == 0


def test_a_budget_ends_the_search_with_the_readouts_share_left(scene: Scene) -> None:
    spending = Spending()
    spending.tokens_for["selection"] += 1000
    spending.add_seconds(50.0, charged=False)
    assert (spending.tokens, spending.charged_tokens, spending.seconds) == (1000, 0, 50.0)
    assert spending.tokens_per_second(2) == 0
    spending.tokens_for["search"] += 600
    spending.add_seconds(6.0, charged=True)
    assert spending.seconds_left(10.0) == 4.0
    assert spending.tokens_per_second(2) == 50.0
    limited_run = scene.federation(rounds=0, seconds=10.0)
    limited_run._ledger.spending = spending
    assert [limited_run._ledger.is_spent(reserve) for reserve in (0.0, 3.9, 4.0)] == [False, False, True]


# --- the device ------------------------------------------------------------------------------------------------------


class ScoringDevice(FakeDevice):
    """A device in one long scoring call, which ends only by `interrupt`."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.scoring, self.stopped = threading.Event(), threading.Event()

    def run(self, plan: RoundPlan, progress: Callable[[int, int], None], cancelled: Callable[[], bool]) -> RoundReport:
        if plan.round == 1:
            self._score()
        return super().run(plan, progress, cancelled)

    def evaluate(self, *_: Any) -> EvaluateReport:
        self._score()
        raise AssertionError("it was interrupted")

    def _score(self) -> None:
        self.scoring.set()
        assert self.stopped.wait(60)
        raise ScoringInterrupted("interrupted")

    def interrupt(self) -> None:
        super().interrupt()
        if self.interrupts > 1:  # the first came between two calls
            self.stopped.set()


def test_cancelling_stops_a_scoring_call_under_way() -> None:
    device = ScoringDevice("a")

    async def play() -> None:
        service = AgentService(device)
        service.start(plan())
        await asyncio.to_thread(device.scoring.wait, 60)
        service.cancel("r", 1)
        service.start(plan(round=2))
        report = await service.wait("r", 2, 60)
        assert isinstance(report, RoundReport)
        assert service.close()

    asyncio.run(play())
    assert device.interrupts == 2


def test_cancelling_queued_work_does_not_stop_other_work() -> None:
    device = ScoringDevice("a")

    async def play() -> None:
        service = AgentService(device)
        service.start(plan())
        await asyncio.to_thread(device.scoring.wait, 60)
        identity = service.start_evaluation(request())
        service.cancel_evaluation(identity)
        await asyncio.sleep(0.3)
        assert device.interrupts == 0
        service.stop()
        assert await asyncio.to_thread(device.stopped.wait, 60)
        assert service.close()

    asyncio.run(play())
