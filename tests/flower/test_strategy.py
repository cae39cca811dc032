"""`FedBPT` over nodes in this process: the native trajectory, quorum, deadlines, resume, and Flower's own loop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord, MetricRecord
from flwr.clientapp.mod import LocalDpMod
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, Strategy

from fedbpt.errors import ConfigError, FedbptError, QuorumError
from fedbpt.flower import FedBPT, client_app
from fedbpt.flower.loop import LATENT
from fedbpt.protocol.specs import PrivacySpec, PromptSpec
from fedbpt.protocol.task_identity import TaskIdentity
from fedbpt.runs.events import DeviceBack, DeviceLost, Event, LateReport, RoundClosed
from fedbpt.runs.store import RunStore
from tests.flower.toy_app import TASK, make_device, natively, settings, short
from tests.flower.toy_grid import Node, ToyGrid, node_of
from tests.support.any_value import VALUES, fault_of
from tests.support.fake_device import FakeDevice
from tests.support.raises import raises
from tests.support.toy_scene import StopRunError, ToyTask, stop
from tests.support.toy_scene import settings as search_alone


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedbpt.flower.nodes.Nodes.__init__.__kwdefaults__", {"poll_s": 0.01, "discover_s": 0.05})


def node(number: int) -> Node:
    return Node(client_app(make_device), **{"partition-id": number})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    with RunStore(tmp_path / "flower.db") as store:
        yield store


@pytest.mark.parametrize("method", ["pooled", "fedbpt"])
def test_a_run_on_flower_is_the_native_run_to_the_bit(method: Any, store: RunStore, tmp_path: Path) -> None:
    asked = settings(method=method, evaluate_every=2)
    native = natively(tmp_path / "native.db", 3, asked)
    strategy = FedBPT(TASK, asked, store, "r", devices=3)
    found = strategy.start(ToyGrid(node(2), node(0), node(1)))
    result = strategy.result
    assert result is not None
    assert (result.digest, result.fits, result.tuned) == (native.digest, native.fits, native.tuned)
    assert (found.arrays[LATENT].numpy() == native.latent).all()
    rounds = [stored.state_digest for stored in store.rounds("r")]
    with RunStore(tmp_path / "native.db") as other:
        assert rounds == [stored.state_digest for stored in other.rounds("r")]
    assert len(rounds) > 5
    assert sorted(found.train_metrics_clientapp) == [1, 2, 3]
    assert sorted(found.evaluate_metrics_clientapp) == [0, 2, 3]


def test_all_messages_of_a_round_are_sent_in_one_call(store: RunStore) -> None:
    grid = ToyGrid(*(node(number) for number in range(4)))
    FedBPT(TASK, search_alone(rounds=2), store, devices=4).start(grid)
    assert max(grid.pushed) == 4


def test_the_server_evaluates_the_mean_of_every_round(store: RunStore) -> None:
    seen: list[int] = []

    def evaluate(round: int, arrays: ArrayRecord) -> MetricRecord:
        seen.append(round)
        return MetricRecord({"norm": float(abs(arrays[LATENT].numpy()).sum())})

    found = FedBPT(TASK, search_alone(), store).start(ToyGrid(node(0)), num_rounds=2, evaluate_fn=evaluate)
    assert seen == [1, 2]
    assert found.evaluate_metrics_serverapp[2]["norm"] > 0


def test_too_few_nodes_are_reported_with_their_problems(store: RunStore) -> None:
    def broken(*_: Any) -> Any:
        raise ConfigError("no such file: mine.jsonl")

    grid = ToyGrid(Node(client_app(broken)), node(0))
    with pytest.raises(QuorumError, match=r"^1 .* 5 s, 3 .*mine\.jsonl"):
        FedBPT(TASK, settings(), store, devices=3, find_s=5.0).start(grid)


# --- quorum, deadlines, failing nodes --------------------------------------------------------------------------------


def events_of(store: RunStore, grid: ToyGrid, react: Any = lambda _event: None, **changes: Any) -> list[Event]:
    heard: list[Event] = []

    def hear(event: Event) -> None:
        heard.append(event)
        react(event)

    asked = search_alone(**{"rounds": 4, "deadline_s": 2.0, **changes})
    FedBPT(ToyTask(), asked, store, "r", devices=len(grid.nodes), on_event=hear).start(grid)
    return heard


def closed(events: list[Event]) -> dict[int, tuple[str, ...]]:
    return {event.round: event.reported for event in events if isinstance(event, RoundClosed)}


def devices(*names: str) -> list[FakeDevice]:
    return [FakeDevice(name) for name in names]


def test_a_round_closes_with_its_quorum_at_the_deadline_and_the_late_report_is_recorded(store: RunStore) -> None:
    a, b, c = devices("a", "b", "c")

    def react(event: Event) -> None:
        if isinstance(event, RoundClosed):
            (c.gate.clear if event.round == 1 else c.gate.set)()

    events = events_of(store, ToyGrid(*map(node_of, (a, b, c))), react, rounds=6, deadline_s=0.5)
    reported = closed(events)
    assert reported[1] == ("a", "b", "c")
    assert reported[2] == ("a", "b")
    assert [event.round for event in events if isinstance(event, LateReport)] == [2]
    assert any(isinstance(event, DeviceBack) for event in events)


def test_a_node_whose_work_fails_is_left_out_and_comes_back(store: RunStore) -> None:
    a, b = devices("a", "b")

    def react(event: Event) -> None:
        if isinstance(event, RoundClosed):
            b.fail = ValueError("out of memory") if event.round == 1 else None

    events = events_of(store, ToyGrid(node_of(a), node_of(b)), react, rounds=30)
    assert closed(events)[2] == ("a",)
    assert "ValueError" in next(event.reason for event in events if isinstance(event, DeviceLost))
    assert closed(events)[30] == ("a", "b")


def test_a_node_that_is_killed_and_started_again_takes_part_under_its_name(store: RunStore) -> None:
    a, b = devices("a", "b")
    first, second = node_of(a), node_of(b)
    grid = ToyGrid(first, second)

    def react(event: Event) -> None:
        if isinstance(event, RoundClosed) and event.round == 1:
            second.stop()
        elif isinstance(event, DeviceLost):
            grid.add(node_of(b))

    events = events_of(store, grid, react, rounds=3, quorum=1.0, deadline_s=20.0)
    assert closed(events) == dict.fromkeys(range(4), ("a", "b"))
    assert [event.device for event in events if isinstance(event, DeviceLost)] == ["b"]


def test_a_round_without_quorum_ends_the_run(store: RunStore) -> None:
    a, b = devices("a", "b")
    a.fail = b.fail = ValueError("no")
    with pytest.raises(QuorumError, match="resume"):
        events_of(store, ToyGrid(node_of(a), node_of(b)))


@pytest.mark.parametrize("parameter", ["task", "settings", "store", "run", "devices", "find_s", "on_event"])
def test_any_value_is_accepted_or_rejected_by_name(parameter: str, store: RunStore) -> None:
    right = {"task": TASK, "settings": settings(), "store": store}
    faults = [fault_of(FedBPT, right, parameter, value) for value in VALUES]
    assert [fault for fault in faults if fault is not None] == []


@pytest.mark.parametrize("wrong", [{"grid": None}, {"num_rounds": -1}, {"num_rounds": 0.5}, {"timeout": float("nan")}])
def test_invalid_arguments_of_start_are_rejected_by_name(wrong: dict[str, Any], store: RunStore) -> None:
    given = {"grid": ToyGrid(), **wrong}
    with pytest.raises(FedbptError, match=r"grid|rounds|timeout"):
        FedBPT(TASK, settings(), store).start(**given)


# --- own checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [0, 2, 9])
def test_a_run_stopped_after_any_round_resumes_to_the_same_result(last: int, store: RunStore, tmp_path: Path) -> None:
    native = natively(tmp_path / "native.db", 2, settings())

    def stop_there(event: Event) -> None:
        if isinstance(event, RoundClosed) and event.round == last:
            stop()

    with pytest.raises(StopRunError):
        FedBPT(TASK, settings(), store, "r", devices=2, on_event=stop_there).start(ToyGrid(node(0), node(1)))
    again = FedBPT(TASK, settings(), store, "r", devices=2)
    again.start(ToyGrid(node(0), node(1)))
    assert again.result is not None
    assert (again.result.digest, again.result.fits) == (native.digest, native.fits)


def test_a_node_repeats_its_report_without_work(store: RunStore) -> None:
    """A server killed before it commits a round sends its plans again."""
    a, b = devices("a", "b")
    grid = ToyGrid(node_of(a), node_of(b))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedbpt.coordinator.ledger.RunLedger.commit", lambda *_: stop())
        with pytest.raises(StopRunError):
            events_of(store, grid)
    assert len(a.plans) == 1
    events = events_of(store, grid, rounds=1)
    assert sorted(closed(events)) == [0, 1]
    assert [plan.round for plan in a.plans] == [0, 1]


# --- Flower's own loop -----------------------------------------------------------------------------------------------


def test_flowers_own_loop_runs_the_same_rounds(store: RunStore, tmp_path: Path) -> None:
    asked = settings(evaluate_every=3, readout="words")  # that of layers begins before the search; this loop has none
    strategy = FedBPT(TASK, asked, store, "r", devices=2)
    found = Strategy.start(strategy, ToyGrid(node(0), node(1)), ArrayRecord(), num_rounds=6)
    natively(tmp_path / "native.db", 2, asked)
    with RunStore(tmp_path / "native.db") as native:
        alike = [stored.state_digest for stored in native.rounds("r")][:6]
    assert [stored.state_digest for stored in store.rounds("r")] == alike
    assert found.arrays[LATENT].numpy().shape == (asked.prompt.d,)
    assert sorted(found.train_metrics_clientapp) == [1, 2, 3, 4, 5, 6]
    assert found.evaluate_metrics_clientapp[3]["n"] == 8


def test_flowers_own_loop_resumes_from_the_store(store: RunStore, tmp_path: Path) -> None:
    asked = settings(readout="words")
    for rounds in (2, 4):
        strategy = FedBPT(TASK, asked, store, "r", devices=2)
        Strategy.start(strategy, ToyGrid(node(0), node(1)), ArrayRecord(), num_rounds=rounds)
    natively(tmp_path / "native.db", 2, asked)
    with RunStore(tmp_path / "native.db") as native:
        assert [stored.state_digest for stored in store.rounds("r")] == [s.state_digest for s in native.rounds("r")][:6]


def test_flowers_own_loop_requires_the_quorum(store: RunStore) -> None:
    a, b = devices("a", "b")
    b.fail = ValueError("no")
    strategy = FedBPT(ToyTask(), search_alone(quorum=1.0), store, devices=2)
    with pytest.raises(QuorumError, match="1 of 2 devices"):
        Strategy.start(strategy, ToyGrid(node_of(a), node_of(b)), ArrayRecord())


# --- a node with another task ----------------------------------------------------------------------------------------


def test_a_node_with_another_task_is_named_and_left_out(store: RunStore) -> None:
    a, b, c = devices("a", "b", "c")
    b.task = TaskIdentity.of("toy", ("y", "x"))
    events: list[Event] = []
    strategy = FedBPT(ToyTask(), search_alone(quorum=0.5), store, devices=3, on_event=events.append)
    strategy.start(ToyGrid(*map(node_of, (a, b, c))))
    assert {event.device for event in events if isinstance(event, DeviceLost)} == {"b"}
    assert strategy.result is not None
    assert [device.reports > 0 for device in strategy.result.devices] == [True, False, True]
    assert b.plans == []


def test_flowers_own_loop_leaves_a_node_with_another_task_out(
    store: RunStore, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = devices("a", "b")
    b.task = None
    strategy = FedBPT(ToyTask(), search_alone(quorum=0.5), store, devices=2)
    Strategy.start(strategy, ToyGrid(node_of(a), node_of(b)), ArrayRecord(), num_rounds=2)
    assert any(record.getMessage().startswith("b ") for record in caplog.records)
    assert (len(a.plans), b.plans) == (2, [])
    strict = FedBPT(ToyTask(), search_alone(quorum=1.0), store, "strict", devices=2)
    with pytest.raises(QuorumError, match=r"1 of 2 devices .*\(b: "):
        Strategy.start(strict, ToyGrid(node_of(a), node_of(b)), ArrayRecord())


# --- what of Flower does not go with it ------------------------------------------------------------------------------


def test_noise_that_a_wrapper_adds_to_the_mean_is_rejected(store: RunStore) -> None:
    inner = FedBPT(TASK, short(), store, devices=2)
    strategy = DifferentialPrivacyClientSideFixedClipping(inner, 1.0, 1.0, 2)
    with raises(ConfigError, field="arrays"):
        Strategy.start(strategy, ToyGrid(node(0), node(1)), ArrayRecord(), num_rounds=3)


@pytest.mark.parametrize("changes", [{"patience": 2}, {"patience": 2, "restarts": 1}])
def test_flowers_own_loop_rejects_patience(store: RunStore, changes: dict[str, int]) -> None:
    strategy = FedBPT(TASK, settings(evaluate_every=1, **changes), store, devices=2)
    with raises(ConfigError, field="patience"):
        Strategy.start(strategy, ToyGrid(node(0), node(1)), ArrayRecord(), num_rounds=3)


@pytest.mark.parametrize("placement", ["layer", "layers"])
def test_flowers_own_loop_rejects_shifts(store: RunStore, placement: Any) -> None:
    strategy = FedBPT(TASK, settings(prompt=PromptSpec(placement=placement)), store, devices=2)
    with raises(ConfigError, field="placement"):
        Strategy.start(strategy, ToyGrid(node(0), node(1)), ArrayRecord(), num_rounds=3)


def test_a_mod_that_adds_noise_to_arrays_fails(store: RunStore) -> None:
    nodes = [Node(client_app(make_device, [LocalDpMod(1.0, 1.0, 1.0, 1e-5)]), **{"partition-id": i}) for i in (0, 1)]
    with pytest.raises(QuorumError, match="LocalDpMod"):
        FedBPT(TASK, short(), store, devices=2, find_s=5.0).start(ToyGrid(*nodes))


def test_a_private_run_adds_noise_on_devices_and_reports_epsilon(store: RunStore) -> None:
    asked = short(privacy=PrivacySpec(clip=0.3, noise_multiplier=2.0, delta=1e-5))
    strategy = FedBPT(TASK, asked, store, devices=2)
    strategy.start(ToyGrid(node(0), node(1)))
    assert strategy.result is not None
    assert strategy.result.epsilon is not None
    assert strategy.result.epsilon > 0
