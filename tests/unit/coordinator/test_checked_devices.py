"""`check_devices`: what one device decides is bounded, and one whose sums make others' rows worse is left out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fedbpt.coordinator.devices.members import Cohort
from fedbpt.coordinator.live import LiveEvaluation
from fedbpt.coordinator.reports.round_reports import evaluation_loss, held_differences, level_reports, template_losses
from fedbpt.coordinator.reports.vetting import leave_out, vet
from fedbpt.coordinator.run_state import CONTRADICTS, MISLEADS, RunState
from fedbpt.errors import ConfigError, QuorumError
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import (
    CrossResult,
    EvaluateReport,
    LocalResult,
    PooledResult,
    RoundReport,
    SelectResult,
    SumsResult,
)
from fedbpt.protocol.specs import Array, Quantized
from fedbpt.runs.events import DeviceLeftOut, DeviceLost, Evaluated, RoundClosed
from fedbpt.runs.settings import RunSettings, stored_settings
from fedbpt.tasks import Row
from tests.support.toy_federation import report
from tests.support.toy_scene import StopRunError, closed, settings, stop
from tests.support.toy_task import TASK
from tests.unit.coordinator.test_layer_runs import LayerScene, moods, same

pytestmark = pytest.mark.slow

HONEST = {name: moods(24, 50 * place) for place, name in enumerate("abcd")}


def inverted(found: Array) -> Array:
    losses = found.numpy()
    return Array.of(losses.max(axis=0) + losses.min(axis=0) - losses, found.dtype)


def wrong_labels(data: list[Row]) -> list[Row]:
    return [(text, 1 - int(label)) for text, label in data]


def inverting(given: RoundReport) -> RoundReport:
    """All losses and sums are inverted."""
    result = given.result
    if isinstance(result, SumsResult):
        return msgspec.structs.replace(
            given, result=msgspec.structs.replace(result, means=Quantized.of(-result.means.numpy()))
        )
    if isinstance(result, PooledResult):
        return msgspec.structs.replace(given, result=PooledResult(losses=inverted(result.losses)))
    if isinstance(result, SelectResult | CrossResult):
        return msgspec.structs.replace(
            given, result=msgspec.structs.replace(result, loss_sums=inverted(result.loss_sums))
        )
    return given


Make = Callable[..., LayerScene]


def scene_of(path: Path, shares: dict[str, list[Row]]) -> LayerScene:
    scene = LayerScene(path, shares)
    for place, device in enumerate(scene.devices.values()):
        device._rows["test"] = tuple(moods(20, 1000 + 20 * place))
    return scene


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    scenes: list[LayerScene] = []

    def made(liar: list[Row] | None = None, change: Callable[[RoundReport], RoundReport] | None = None) -> LayerScene:
        shares = {**HONEST, "liar": liar or moods(24, 400)}
        scenes.append(scene_of(tmp_path / f"{len(scenes)}.sqlite", shares))
        if change is not None:
            scenes[-1].devices["liar"].change = change
        return scenes[-1]

    yield made
    for scene in scenes:
        scene.store.close()


# --- a run -----------------------------------------------------------------------------------------------------------


def left_out(scene: LayerScene) -> list[tuple[str, str]]:
    purposes = {event.round: event.purpose for event in scene.of(RoundClosed)}
    return [(event.device, purposes[event.round]) for event in scene.of(DeviceLeftOut)]


@pytest.mark.parametrize("lies", ["labels", "inverted"])
def test_a_liar_is_left_out_of_the_readout_and_named(make: Make, lies: str) -> None:
    scene = make(wrong_labels(moods(24, 400))) if lies == "labels" else make(None, inverting)
    result = scene.run(quorum=1.0)
    assert left_out(scene) == [("liar", "probe")]
    (event,) = scene.of(DeviceLeftOut)
    later = {closed.reported for closed in scene.of(RoundClosed) if closed.round >= event.round}
    assert later == {("a", "b", "c", "d")}
    assert scene.devices["liar"].plans[-1].round == event.round
    assert scene.of(DeviceLost) == []
    for event in scene.of(DeviceLeftOut):
        assert event.reason == MISLEADS
        line = next(line for line in scene.store.history("r") if line.round == event.round)
        assert line.lost == {"liar": MISLEADS}
        assert line.reported == ("a", "b", "c", "d")
    assert result.baselines["probe"].accuracy > 0.9
    assert result.shipped in ("probe", "read")


def test_a_liar_with_honest_sums_is_left_out_once_its_losses_contradict_them(make: Make) -> None:
    def inverting_losses(given: RoundReport) -> RoundReport:
        return given if isinstance(given.result, SumsResult) else inverting(given)

    scene = make(None, inverting_losses)
    result = scene.run()
    assert left_out(scene) == [("liar", "probe")]
    (event,) = scene.of(DeviceLeftOut)
    assert event.reason == CONTRADICTS
    assert result.baselines["probe"].accuracy > 0.9


def test_honest_devices_are_not_left_out(make: Make) -> None:
    scene = make()
    scene.run()
    assert scene.of(DeviceLeftOut) == []
    assert {event.reported for event in scene.of(RoundClosed)} == {("a", "b", "c", "d", "liar")}


def test_devices_that_have_one_label_each_are_not_left_out(tmp_path: Path) -> None:
    data = moods(120, 0)
    shares = {name: [row for row in data[24 * i : 24 * (i + 1)] if row[1] == i % 2] for i, name in enumerate("abcde")}
    scene = scene_of(tmp_path / "single.sqlite", shares)
    result = scene.run()
    assert scene.of(DeviceLeftOut) == []
    assert result.baselines["probe"].accuracy > 0.9
    scene.store.close()


def test_without_the_check_nobody_is_left_out(make: Make) -> None:
    scene = make(wrong_labels(moods(24, 400)))
    scene.run(check_devices=False)
    assert scene.of(DeviceLeftOut) == []


@pytest.mark.parametrize("lies", ["labels", "inverted"])
def test_a_run_with_a_liar_stopped_at_every_round_resumes_to_the_same_result(make: Make, lies: str) -> None:
    what = (wrong_labels(moods(24, 400)), None) if lies == "labels" else (None, inverting)
    whole, pieces = (make(*what) for _ in range(2))
    expected = whole.run()
    n_rounds = len(whole.of(RoundClosed))
    for number in range(n_rounds):
        pieces.when(closed(number), stop)
        with pytest.raises(StopRunError):
            pieces.run()
    same(pieces.run(), expected)
    assert left_out(pieces) == left_out(whole)


def test_a_device_that_is_left_out_tells_no_figure(make: Make) -> None:
    scene = make(wrong_labels(moods(24, 400)))
    result = scene.run(evaluate_every=1)
    (event,) = scene.of(DeviceLeftOut)
    later = [each for each in scene.of(Evaluated) if each.round >= event.round]
    assert later
    assert {each.devices for each in later} == {("a", "b", "c", "d")}
    assert result.tuned.n == 4 * 20


def test_who_is_left_out_of_a_round_that_is_not_closed_may_come_back(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_ledger: Any, number: int, reports: list[RoundReport]) -> Any:
        if {each.device for each in reports} == {"a", "b", "c", "d"}:
            raise QuorumError(f"round {number}: too few", limit=5)
        return list(reports), {}

    scene = make(None, inverting)
    with monkeypatch.context() as patch:
        patch.setattr("fedbpt.coordinator.federation.vet", refuse)
        with pytest.raises(QuorumError):
            scene.run()
    assert scene.of(DeviceLeftOut) == []
    begun = len(list(scene.store.rounds("r")))
    scene.devices["liar"].change = lambda given: given
    scene.when(closed(begun), stop)
    with pytest.raises(StopRunError):
        scene.run()
    scene.run()
    assert {event.reported for event in scene.of(RoundClosed)} == {("a", "b", "c", "d", "liar")}


def test_a_later_loss_does_not_hide_that_a_device_is_left_out(make: Make) -> None:
    scene = make(wrong_labels(moods(24, 400)))
    scene.run()
    (found,) = scene.of(DeviceLeftOut)
    pieces = make(wrong_labels(moods(24, 400)))
    pieces.when(closed(found.round), stop)
    with pytest.raises(StopRunError):
        pieces.run()
    pieces.store.record_losses("r", found.round, {"liar": "it does not answer"})
    asked = len(pieces.devices["liar"].plans)
    pieces.run()
    assert len(pieces.devices["liar"].plans) == asked


def test_reports_are_checked_off_the_event_loop(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    loops: list[bool] = []

    def noted(check: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                loops.append(False)
            else:
                loops.append(True)
            return check(*given)

        return run

    monkeypatch.setattr("fedbpt.coordinator.federation.leave_out", noted(leave_out))
    monkeypatch.setattr("fedbpt.coordinator.federation.vet", noted(vet))
    scene = make()
    scene.run(rounds=1)
    assert loops == [False, False] * len(scene.of(RoundClosed))


# --- live evaluations ------------------------------------------------------------------------------------------------


class NoDevices:
    """In the place of a fleet: notes who is asked, and gets no report."""

    def __init__(self, names: str) -> None:
        self.members = dict.fromkeys(names)
        self.cohorts: list[Cohort | None] = []

    async def run_round(self, *given: Any) -> list[RoundReport]:
        self.cohorts.append(given[5])
        raise QuorumError("round 1: nobody reported: start more devices", limit=1)


@pytest.mark.parametrize(("left_out", "expected"), [((), None), (("b",), ("a", "c")), (("a", "b"), ("c",))])
def test_a_live_readout_asks_no_device_that_is_left_out(
    make: Make, left_out: tuple[str, ...], expected: tuple[str, ...] | None
) -> None:
    ledger = make().federation()._ledger
    ledger.state.left_out.update(left_out)
    ledger.state.n_layer, ledger.state.n_embd = 4, 8
    devices: Any = NoDevices("abc")
    live = LiveEvaluation(ledger, devices, devices, lambda: 1.0)
    assert asyncio.run(live._readout_fit(ledger.state.mean)) is None
    (cohort,) = devices.cohorts
    assert (cohort and cohort.order) == expected


def test_without_reports_nobody_is_left_out() -> None:
    assert leave_out(settings(), None, []) == ([], {})


def test_one_device_does_not_decide_when_patience_runs_out() -> None:
    honest = [held(12, loss) for loss in (0.5, 0.6, 0.55, 0.52)]
    for lie in (0.0, 1e6):
        found = evaluation_loss([*honest, held(12, lie)], 2.0, 0, checked=True)
        assert 0.45 < found < 0.65
    assert evaluation_loss([*honest, held(12, 1e6)], 2.0) > 1e5
    assert evaluation_loss(honest[:2], 2.0, 0, checked=True) == pytest.approx(0.55)


# --- settings --------------------------------------------------------------------------------------------------------


def test_runs_of_before_are_continued_without_the_check() -> None:
    begun = settings()
    fields = msgspec.msgpack.decode(codec.encode(begun))
    assert stored_settings(msgspec.msgpack.encode(fields)).check_devices
    del fields["check_devices"]
    before = stored_settings(msgspec.msgpack.encode(fields))
    assert not before.check_devices
    assert not begun.continuing(before).check_devices
    assert begun.continuing(before).identity() == before.identity() != begun.identity()


def test_a_run_without_the_check_stays_so_and_one_with_it_is_another(make: Make) -> None:
    scene = make()
    first = scene.run(rounds=2, check_devices=False)
    longer = scene.run(rounds=3)
    assert (first.settings.check_devices, longer.settings.check_devices) == (False, False)
    checked = scene.run("checked", rounds=2)
    assert checked.settings.check_devices
    with pytest.raises(ConfigError):
        scene.run("checked", rounds=3, check_devices=False)


# --- what one device decides -----------------------------------------------------------------------------------------


def held(n: int, *losses: float, spread: float = 0.1) -> EvaluateReport:
    """A report of held rows with these mean losses, whose differences vary by ``spread``."""
    squares = tuple(n * ((loss - losses[0]) ** 2 + spread**2 * (i > 0)) for i, loss in enumerate(losses))
    return EvaluateReport(
        n=n, correct=(0,) * len(losses), loss_sums=tuple(n * loss for loss in losses), seconds=0.0,
        difference_squares=squares,
    )  # fmt: skip


WORSE = [held(12, 0.5, 0.80), held(12, 0.4, 0.65), held(13, 0.6, 0.95), held(12, 0.5, 0.7)]
BETTER = [held(12, 0.5, 0.30), held(12, 0.4, 0.25), held(13, 0.6, 0.35), held(12, 0.5, 0.3)]
NAMES = ("probe", "calibrated")


def chosen(reports: list[EvaluateReport], **changes: Any) -> str:
    asked: RunSettings = settings(**changes)
    state = RunState(TASK, asked, asked.aggregator())
    state.choose(NAMES, reports)
    return state.shipped


@pytest.mark.parametrize("n", [12, 10**6])
def test_one_device_does_not_choose_what_is_shipped(n: int) -> None:
    sure = held(n, 9e3, 0.0, spread=0.0)
    assert chosen([*WORSE, sure], check_devices=False) == "calibrated"
    assert chosen([*WORSE, sure]) == "probe"


@pytest.mark.parametrize("n", [12, 10**6])
def test_one_device_does_not_prevent_what_all_others_find_better(n: int) -> None:
    against = held(n, 0.0, 9e3, spread=9e3)
    assert chosen([*BETTER, against], check_devices=False) == "probe"
    assert chosen([*BETTER, against]) == "calibrated"


def test_honest_devices_choose_as_without_the_check() -> None:
    for reports in (WORSE, BETTER, WORSE[:2], BETTER[:2], BETTER[:1]):
        assert chosen(reports) == chosen(reports, check_devices=False)
    for cap in (0.0, 2.0):
        n, means, variances = held_differences(BETTER[:2], cap)
        plain = held_differences(BETTER[:2])
        assert n == plain[0]
        np.testing.assert_allclose(means, plain[1])
        np.testing.assert_allclose(variances, plain[2])


def test_one_device_does_not_select_the_template() -> None:
    honest = [
        report(name, 0, SelectResult(loss_sums=Array.of(np.array([8 * a, 8 * b]))))
        for name, a, b in (("a", 0.5, 0.9), ("b", 0.6, 0.9), ("c", 0.4, 0.9), ("d", 0.5, 0.8))
    ]
    liar = report("liar", 0, SelectResult(loss_sums=Array.of(np.array([8e3, 0.0]))))
    assert template_losses([*honest, liar], ()).argmin() == 1
    assert template_losses([*honest, liar], (), checked=True).argmin() == 0


def test_losses_of_candidates_are_levelled_and_other_reports_left_as_they_are() -> None:
    losses = np.random.default_rng(0).random((4, 6))
    reports = [report(f"d{i}", 1, PooledResult(losses=Array.of(each))) for i, each in enumerate(losses)]
    loud = report("liar", 1, PooledResult(losses=Array.of(100 * losses[0])))
    results = [each.result for each in level_reports([*reports, loud])]
    norms = [np.linalg.norm(each.losses.numpy()) for each in results if isinstance(each, PooledResult)]
    assert max(norms) <= 1.5 * max(norms[:4]) * (1 + 1e-12)
    local = [report("a", 1, LocalResult(mean=Array.of(np.zeros(2)), fitness=1.0, sigma_squares=1.0))]
    assert level_reports(local) == local
    odd = [*reports, report("odd", 1, PooledResult(losses=Array.of(np.zeros(5))))]
    assert level_reports(odd) == odd  # the aggregator refuses them, by name


def test_reports_that_are_no_sums_are_never_left_out() -> None:
    reports = [report(name, 1, PooledResult(losses=Array.of(np.zeros(4)))) for name in "abc"]
    assert leave_out(settings(), None, reports) == (reports, {})
