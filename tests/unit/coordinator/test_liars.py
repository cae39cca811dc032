"""One device of four sends a number that is too large, too small or NaN: the run goes on, and can be resumed."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbpt.aggregation import SearchSettings, method_named
from fedbpt.aggregation.readout import ReadoutFit
from fedbpt.coordinator.clients import DeviceClient, HttpClient, InProcessClient
from fedbpt.coordinator.federation import Federation
from fedbpt.coordinator.reports.report_checks import check_report
from fedbpt.coordinator.run_state import RunState
from fedbpt.coordinator.work_kinds.readout_fit import means_bound
from fedbpt.device.agent import AgentService
from fedbpt.device.agent.server import AgentServer
from fedbpt.device.device import Device
from fedbpt.errors import FederationError, QuorumError
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import (
    DeviceInfo,
    EvaluateReport,
    FitResult,
    FitWork,
    LocalResult,
    LocalWork,
    PooledResult,
    PooledWork,
    RoundPlan,
    RoundReport,
    SelectResult,
    Work,
)
from fedbpt.protocol.specs import Array, Message, ObjectiveSpec, PromptSpec
from fedbpt.runs.events import DeviceLost, Event, RoundClosed
from fedbpt.runs.result import RunResult
from fedbpt.runs.store import RunStore
from fedbpt.search.local_search import farthest_move, local_search, local_seed, sigma_squares_bounds
from fedbpt.search.population import sample_population
from tests.support.caller import called_by
from tests.support.lies import EXTREMES, Liar, changed, leaves
from tests.support.raises import raises
from tests.support.toy_federation import report
from tests.support.toy_scene import settings as toy_settings
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows

pytestmark = pytest.mark.slow

HONEST = ("a", "b", "c")
FITS = {
    "rounds": 2,
    "popsize": 4,
    "iterations": 2,
    "prompt": PromptSpec(d=4, alpha=2.0, seed=3),
    "objective": ObjectiveSpec(batch_size=4, readout_words=4),
    "calibrate": True,
    "evaluate_every": 1,
}
METHODS = ("pooled", "fedavg", "fedbpt")


def device(name: str) -> Device:
    number = (*HONEST, "liar").index(name)
    share = rows(8, 10 * number)
    return Device(name, ToyScorer(), share, share[:4], rows(6, 100 + 10 * number), task=TASK)


def tune(
    store: Path, clients: list[DeviceClient], on_event: Callable[[Event], None] = lambda _: None, **changes: Any
) -> RunResult:
    chosen = toy_settings(**{**FITS, **changes})
    with RunStore(store) as opened:
        return Federation(clients, TASK, chosen, chosen.aggregator(), opened, "r", on_event).run()


def lost(events: list[Event]) -> dict[str, str]:
    return {event.device: event.reason for event in events if isinstance(event, DeviceLost)}


def survives(lie: Callable[[Any], Any], **changes: Any) -> list[Event]:
    """The events of a run with one device that lies, and of a longer one that resumes it."""
    events: list[Event] = []
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "runs.db"
        for rounds in (2, 3):
            clients = [InProcessClient(device(name)) for name in HONEST]
            liar = InProcessClient(Liar(device("liar"), lie))
            result = tune(store, [*clients, liar], events.append, **{**changes, "rounds": rounds})
            assert set(lost(events)) <= {"liar"}, lost(events)
            assert result.rounds == rounds
            assert {summary.tuned.n > 0 for summary in result.devices if summary.name in HONEST} == {True}
            assert np.isfinite(result.latent).all()
            assert math.isfinite(result.tuned.loss)
    return events


def template() -> list[tuple[type, tuple[Any, ...]]]:
    """(result or message type, path of a number) of everything that a device sends in a run."""
    array = Array.of(np.zeros((1, 1)))
    results = (
        SelectResult(loss_sums=array, label_counts=(1, 1)),
        PooledResult(losses=array),
        LocalResult(mean=array, fitness=0.0, sigma_squares=1.0),
        FitResult(purpose="readout", loss=0.0, means=array),
    )
    shared = RoundReport(
        run="r", round=0, device="a", plan_digest="", result=results[0], n_texts=1, evaluations=1, tokens=1,
        seconds=0.0, peak_rss_bytes=1,
    )  # fmt: skip
    found: list[tuple[type, tuple[Any, ...]]] = []
    for result in results:
        found += [(type(result), path) for path in leaves(msgspec.structs.replace(shared, result=result))]
    evaluation = EvaluateReport(n=1, correct=(1,), loss_sums=(1.0,), seconds=0.0)
    info = msgspec.structs.replace(device("a").info(), tokens_per_second=1.0, celsius=1.0, battery=1.0)
    return found + [(type(message), path) for message in (evaluation, info) for path in leaves(message)]


NUMBERS = template()


def lie_of(kind: type, path: tuple[Any, ...], value: float) -> Callable[[Message], Message]:
    """Changes the number at ``path`` of messages of ``kind``, or of reports whose result is of that kind."""

    def lie(message: Any) -> Any:
        if kind not in (type(message), type(getattr(message, "result", None))):
            return message
        known = {"label_counts", "tokens_per_second", "celsius", "battery"}
        if known & set(path) and path not in set(leaves(message)):
            filled = {"tokens_per_second": 1.0, "celsius": 1.0, "battery": 1.0}
            if kind is not DeviceInfo:
                return message
            message = msgspec.structs.replace(message, **filled)
        return changed(message, path, value)

    return lie


@settings(max_examples=16, deadline=None)
@given(
    number=st.sampled_from(NUMBERS),
    value=st.sampled_from(EXTREMES),
    method=st.sampled_from(METHODS),
    balanced=st.booleans(),
)
def test_no_number_ends_a_run(number: tuple[type, tuple[Any, ...]], value: float, method: str, balanced: bool) -> None:
    survives(lie_of(*number, value), method=method, balanced=balanced)


RESULT = "result"
ATTACKS: dict[str, tuple[dict[str, Any], type, tuple[Any, ...], float]] = {
    "memory": ({}, RoundReport, ("peak_rss_bytes",), 2**63),
    "memory in a status": ({}, DeviceInfo, ("peak_rss_bytes",), 2**63),
    "rows in a status": ({}, DeviceInfo, ("n_train",), 2**64 - 1),
    "tokens": ({}, RoundReport, ("tokens",), 2**63),
    "rows of an evaluation": ({}, EvaluateReport, ("n",), 2**64 - 1),
    "beyond 64 bits": ({}, EvaluateReport, ("n",), 2**64),
    "moments": ({}, FitResult, (RESULT, "means"), 1e5),
    "label counts": ({"balanced": True}, SelectResult, (RESULT, "label_counts", 0), 10**12),
    "step sizes": ({"method": "fedavg"}, LocalResult, (RESULT, "sigma_squares"), 1.7e308),
    "vanishing step sizes": ({"method": "fedavg"}, LocalResult, (RESULT, "sigma_squares"), 5e-324),
    "a mean": ({"method": "fedavg"}, LocalResult, (RESULT, "mean"), 4.9e8),
    "FedBPT's step sizes": ({"method": "fedbpt"}, LocalResult, (RESULT, "sigma_squares"), 1.7e308),
    "FedBPT's mean": ({"method": "fedbpt"}, LocalResult, (RESULT, "mean"), 4.9e8),
    "a ratio": ({"method": "fedavg", "objective": ObjectiveSpec(batch_size=4, readout_words=0, perturb=0.5)},
                LocalResult, (RESULT, "fitness"), 1.7e308),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_device_that_lies_is_named_and_the_others_go_on(attack: str) -> None:
    changes, kind, path, value = ATTACKS[attack]
    events = survives(lie_of(kind, path, value), **changes)
    assert "liar" in lost(events)
    closed = [event for event in events if isinstance(event, RoundClosed)]
    assert all(set(HONEST) <= set(event.reported) for event in closed)


@contextmanager
def reached(transport: str, folder: Path, lie: Callable[[Any], Any]) -> Iterator[list[DeviceClient]]:
    devices = [*(device(name) for name in HONEST), Liar(device("liar"), lie)]
    with ExitStack() as stack:
        if transport == "mailbox":
            coordinator = stack.enter_context(called_by(folder, *devices))
            yield [coordinator.client(each.name) for each in devices]
            return
        servers = [stack.enter_context(AgentServer(AgentService(each))) for each in devices]
        yield [HttpClient(server.url, each.name) for server, each in zip(servers, devices, strict=True)]


@pytest.mark.parametrize("transport", ["http", "mailbox"])
@pytest.mark.parametrize("attack", ["memory", "rows of an evaluation", "a mean"])
def test_a_lie_over_the_network_ends_no_run(tmp_path: Path, transport: str, attack: str) -> None:
    changes, kind, path, value = ATTACKS[attack]
    events: list[Event] = []
    with reached(transport, tmp_path, lie_of(kind, path, value)) as clients:
        result = tune(tmp_path / "runs.db", clients, events.append, **changes)
    assert set(lost(events)) == {"liar"}
    assert result.rounds == 2


# --- the plan that follows ----------------------------------------------------------------------------------


class Fragile(type(toy_settings().aggregator())):  # type: ignore[misc] # Pooled, without its limits
    """Reaches a state that no message can hold after a report of ``liars``."""

    def work(self, round: int) -> Any:
        work = super().work(round)
        if not getattr(self, "spoilt", False):
            return work
        return msgspec.structs.replace(work, state=msgspec.structs.replace(work.state, sigma=-1.0))

    def update(self, reports: Any) -> None:
        super().update(reports)
        self.spoilt = any(report.device in self.liars for report in reports)

    liars: tuple[str, ...] = ("liar",)


def fragile_run(tmp_path: Path, events: list[Event], **changes: Any) -> RunResult:
    chosen = toy_settings(**{**FITS, "objective": ObjectiveSpec(batch_size=4, readout_words=0), **changes})
    aggregator = Fragile(4, popsize=chosen.popsize, seed=chosen.seed)
    clients = [InProcessClient(device(name)) for name in (*HONEST, "liar")]
    with RunStore(tmp_path / "runs.db") as store:
        return Federation(clients, TASK, chosen, aggregator, store, "r", events.append).run()


def test_a_report_that_makes_the_next_plan_impossible_is_left_out(tmp_path: Path) -> None:
    events: list[Event] = []
    result = fragile_run(tmp_path, events)
    assert set(lost(events)) == {"liar"}
    searched = [event for event in events if isinstance(event, RoundClosed) and event.purpose == "search"]
    assert [set(event.reported) for event in searched] == [set(HONEST)] * 2
    assert result.rounds == 2


def test_a_round_that_no_single_report_spoils_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fragile, "liars", ("b", "liar"))
    events: list[Event] = []
    with pytest.raises(FederationError):
        fragile_run(tmp_path, events)
    assert not [event for event in events if isinstance(event, RoundClosed) and event.purpose == "search"]
    monkeypatch.setattr(Fragile, "liars", ())
    assert fragile_run(tmp_path, events).rounds == 2


def test_a_round_that_misses_its_quorum_without_the_liar_is_not_committed(tmp_path: Path) -> None:
    events: list[Event] = []
    with raises(QuorumError) as caught:
        fragile_run(tmp_path, events, quorum=1.0)
    assert "liar" in str(caught.value)
    assert not [event for event in events if isinstance(event, RoundClosed) and event.purpose == "search"]


# --- liars within the bounds ----------------------------------------------------------------------------------------


def asked(work: Work, round: int, device: str) -> RoundPlan:
    """The plan with ``work`` as a device decodes it."""
    chosen = toy_settings(**FITS)
    plan = RoundPlan(
        run="r", round=round, device=device, seed=3, model_fingerprint="f", task=TASK.identity,
        labels=TASK.labels,
        template=TASK.templates[0], prompt=msgspec.structs.replace(chosen.prompt, d=D), objective=ObjectiveSpec(),
        work=work,
    )  # fmt: skip
    return codec.decode(codec.encode(plan), RoundPlan)


def answered(plan: RoundPlan, losses: Callable[[np.ndarray, int], np.ndarray]) -> RoundReport:
    result: PooledResult | LocalResult
    if isinstance(plan.work, PooledWork):
        found = losses(sample_population(plan.work.state, plan.work.popsize, plan.seed, plan.work.generation), 0)
        result = PooledResult(losses=Array.of(found))
    else:
        assert isinstance(plan.work, LocalWork)
        result = local_search(plan.work, local_seed(plan), losses).with_fitness(1.0)
    made = msgspec.structs.replace(report(plan.device, plan.round, result, 8), plan_digest=codec.digest(plan), run="r")
    check_report(made, plan)
    return made


def as_far_as_believed(honest: RoundReport, plan: RoundPlan) -> RoundReport:
    """The accepted mean farthest from the plan's, with the largest accepted step size."""
    result = honest.result
    assert isinstance(result, LocalResult)
    assert isinstance(plan.work, LocalWork)
    away = np.ones(D) / math.sqrt(D) * farthest_move(plan.work) * 0.999
    farther = LocalResult(
        mean=Array.of(plan.work.state.mean.numpy() + away),
        fitness=0.0,
        sigma_squares=sigma_squares_bounds(plan.work)[1],
    )
    lie = msgspec.structs.replace(honest, result=farther)
    check_report(lie, plan)
    return lie


D = 4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shrink", [False, True])
def test_no_sequence_of_plausible_lies_leads_to_a_plan_that_devices_refuse(method: str, shrink: bool) -> None:
    aggregator = method_named(method).make(SearchSettings(d=D, sigma0=1.0, popsize=6, iterations=3, seed=3))

    def longest(z: np.ndarray, _: int) -> np.ndarray:
        length = np.linalg.norm(z, axis=1)
        return 9e3 * (length if shrink else -length) / (1 + length.max()) + 9e3 * (not shrink)

    for round in range(150 if method == "pooled" else 25):
        plans = [asked(aggregator.work(round), round, name) for name in ("a", "liar")]
        reports = [answered(plan, lambda z, _: ((z - 1) ** 2).sum(axis=1).clip(0, 1)) for plan in plans[:-1]]
        lie = answered(plans[-1], longest)
        if method != "pooled" and not shrink:
            lie = as_far_as_believed(lie, plans[-1])
        aggregator.update([*reports, lie])
    assert np.isfinite(aggregator.mean).all()
    assert (np.abs(aggregator.mean).max() > 1e5) == (not shrink)  # at its bound


def test_no_gradients_within_the_bounds_lead_to_a_plan_that_devices_refuse() -> None:
    rng = np.random.default_rng(4)
    for seed in range(20):
        fit = ReadoutFit("readout", np.zeros(D), 6, 3)
        rng = np.random.default_rng(seed)
        scale = 10.0 ** rng.uniform(-12, 0)
        while not fit.done:
            plan = asked(fit.work(), 1, "liar")
            assert isinstance(plan.work, FitWork)
            plan = msgspec.structs.replace(plan, labels=("x", "y", "z"))
            bound = np.broadcast_to(means_bound(plan, plan.work), (1, 7) if plan.work.readout is None else (1, 7, 3))
            means = bound * scale * rng.uniform(-1, 1, bound.shape)
            if plan.work.readout is None:
                means[:, -1] = (means[:, :-1] ** 2).sum()
            result = FitResult(purpose="readout", loss=rng.uniform(0, 9e3), means=Array.of(means, "<f4"))
            lie = msgspec.structs.replace(report("liar", 1, result, 8), plan_digest=codec.digest(plan), run="r")
            check_report(lie, plan)
            fit.update([lie])
        asked(fit.work(), 2, "a")


def test_a_round_is_tried_out_on_a_copy_of_the_state() -> None:
    chosen = toy_settings()
    state = RunState(TASK, chosen, chosen.aggregator())
    before = state.digest()
    copied = state.copy()
    losses = PooledResult(losses=Array.of(np.arange(float(chosen.popsize))))
    copied.apply(1, [report(name, 1, losses) for name in HONEST])
    assert copied.digest() != before == state.digest()
    assert (state.closed, copied.closed) == (-1, 1)
