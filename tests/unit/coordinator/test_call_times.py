"""When waiting devices are told to call: held before their round, later otherwise, never beyond the bounds."""

from __future__ import annotations

import asyncio
import math
import random
from pathlib import Path

import pytest

from fedbpt.coordinator.clients.mailbox import Pacer, PostOffice
from fedbpt.coordinator.control import RunControl
from fedbpt.coordinator.devices import call_times
from fedbpt.coordinator.devices.call_times import EARLY, FIRST_ROUND_S, HELD_POLLS, MAX_AHEAD, MIN_PAUSE_S, CallTimes
from fedbpt.coordinator.federation import Federation
from fedbpt.protocol.polling import MAX_PAUSE_S, call_s
from fedbpt.runs.store import RunStore
from tests.support.toy_scene import StopRunError, ToyTask, settings

FLEET = frozenset(f"d{i}" for i in range(HELD_POLLS + 1))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def times(clock: Clock, bound_s: float = 300.0, devices: frozenset[str] = FLEET) -> CallTimes:
    return CallTimes(devices, lambda: bound_s, chance=random.Random(1), clock=clock)


def nth(n: int) -> object:
    """A draw of every device in the n-th round from now on."""
    return lambda ahead, _device: ahead == n


def played(clock: Clock, pacer: CallTimes, round_s: float, then: object) -> None:
    """Rounds of ``round_s`` seconds, and one that has just opened, after which devices are drawn by ``then``."""
    for _ in range(5):
        pacer.opened(nth(1))  # type: ignore[arg-type]
        clock.now += round_s
    pacer.opened(then)  # type: ignore[arg-type]


def test_no_time_is_better_than_another_while_all_devices_may_be_asked() -> None:
    pacer = times(Clock())
    assert pacer("d1") == math.inf
    pacer.opened(nth(3))  # type: ignore[arg-type]
    assert 0.0 < pacer("d1") < math.inf
    pacer.ask_all()
    assert pacer("d1") == math.inf


def test_a_small_fleet_is_not_paced() -> None:
    pacer = times(Clock(), devices=frozenset(list(FLEET)[:HELD_POLLS]))
    pacer.opened(nth(9))  # type: ignore[arg-type]
    assert pacer("d1") == math.inf


def test_devices_of_the_next_round_wait_and_foreign_ones_are_no_concern() -> None:
    clock = Clock()
    pacer = times(clock)
    played(clock, pacer, 60.0, nth(1))
    assert pacer("d1") == 0.0
    assert pacer("elsewhere") == math.inf


@pytest.mark.parametrize("ahead", [2, 3, 4])
def test_a_device_is_back_in_the_first_half_of_the_round_before_its_own(ahead: int) -> None:
    clock = Clock()
    pacer = times(clock)
    played(clock, pacer, 60.0, nth(ahead))
    pauses = sorted(pacer("d1") for _ in range(2000))
    first, last = EARLY * 60.0 * (ahead - 1), EARLY * 60.0 * (ahead - 0.5)
    assert first <= pauses[0] < first + 0.5
    assert last - 0.5 < pauses[-1] <= last
    assert abs(pauses[1000] - (first + last) / 2) < 2.0
    clock.now += 40.0
    assert EARLY * (60.0 * (ahead - 1) - 40.0) <= pacer("d1")


def test_a_device_that_is_due_in_a_moment_waits() -> None:
    clock = Clock()
    pacer = times(clock)
    played(clock, pacer, 60.0, nth(2))
    clock.now += 90.0  # a round that takes longer than usual counts as about to close
    assert {pacer("d1") for _ in range(50)} & {0.0}
    assert all(pause == 0.0 or pause >= MIN_PAUSE_S for pause in (pacer("d1") for _ in range(200)))


@pytest.mark.parametrize(("bound_s", "longest"), [(300.0, 300.0), (1e6, MAX_PAUSE_S)])
def test_no_pause_is_longer_than_its_bound_and_those_at_it_are_spread(bound_s: float, longest: float) -> None:
    clock = Clock()
    pacer = times(clock, bound_s)
    played(clock, pacer, 60.0, lambda _ahead, _device: False)
    pauses = [pacer("d1") for _ in range(500)]
    assert 0.75 * longest <= min(pauses) < 0.8 * longest
    assert 0.95 * longest < max(pauses) <= longest


def test_before_a_round_has_closed_rounds_count_as_short() -> None:
    pacer = times(Clock())
    pacer.opened(nth(2))  # type: ignore[arg-type]
    assert EARLY * FIRST_ROUND_S <= pacer("d1") <= 1.5 * EARLY * FIRST_ROUND_S


@pytest.mark.parametrize("round_s", [0.0, 0.01, 60.0])
def test_no_further_ahead_is_looked_than_the_bound_and_a_limit(round_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    clock = Clock()
    pacer = times(clock)
    played(clock, pacer, round_s, lambda ahead, _device: bool(asked.append(ahead)))
    pacer("d1")
    assert asked == list(range(1, min(MAX_AHEAD, 6) + 1) if round_s == 60.0 else range(1, MAX_AHEAD + 1))
    monkeypatch.setattr(call_times, "HELD_POLLS", len(FLEET))
    assert pacer("d1") == math.inf


def test_devices_of_an_open_round_wait_while_it_is_short_of_them() -> None:
    short = True
    pacer = CallTimes(FLEET, lambda: 300.0, lambda: short)
    pacer.opened(lambda ahead, device: ahead == (0 if device == "d1" else 3))
    assert pacer("d1") == 0.0
    assert pacer("d2") > 0.0
    short = False
    assert pacer("d1") > 0.0


def test_what_is_done_between_rounds_is_no_part_of_their_duration() -> None:
    clock = Clock()
    pacer = times(clock)
    for _ in range(5):
        pacer.opened(nth(1))  # type: ignore[arg-type]
        clock.now += 60.0
        pacer.ask_all()
        clock.now += 500.0  # an evaluation
    pacer.opened(nth(2))  # type: ignore[arg-type]
    assert EARLY * 60.0 <= pacer("d1") <= EARLY * 90.0


# --- many devices, and a short deadline ------------------------------------------------------------------------------


MANY = frozenset(f"d{i}" for i in range(20_000))


@pytest.mark.parametrize(("bound_s", "longest"), [(30.0, 30.0), (300.0, call_s(len(MANY)))])
def test_a_round_of_all_reaches_a_large_fleet_before_its_deadline(bound_s: float, longest: float) -> None:
    pacer = times(Clock(), bound_s, MANY)
    office = PostOffice()
    for device in MANY:
        office.box(device)
    office.pace("r", pacer)
    pauses = [office.pause_s("d1") for _ in range(500)]
    assert 0.75 * longest <= min(pauses) < 0.8 * longest
    assert 0.95 * longest < max(pauses) <= longest
    assert pacer("elsewhere") == math.inf


def test_a_small_run_of_a_coordinator_with_many_devices_has_the_same_bound() -> None:
    pacer = CallTimes(frozenset(["d1"]), lambda: 30.0, n_calling=lambda: len(MANY))
    assert all(22.5 <= pacer("d1") <= 30.0 for _ in range(100))


def test_the_bound_is_that_of_the_present() -> None:
    bounds = [300.0, 20.0]
    clock = Clock()
    pacer = CallTimes(MANY, lambda: bounds[0], chance=random.Random(1), clock=clock)
    for at_most in (call_s(len(MANY)), 20.0):
        pacer.ask_all()
        assert 0.75 * at_most <= pacer("d1") <= at_most
        played(clock, pacer, 60.0, lambda _ahead, _device: False)
        assert 0.75 * bounds[0] <= pacer("d1") <= bounds[0]
        bounds.append(bounds.pop(0))


def test_a_run_calls_its_devices_within_half_of_its_deadline_which_may_be_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call_times, "call_s", lambda _n: 120.0)
    pacers: list[Pacer] = []

    def pace(_office: PostOffice, _run: str, pacer: Pacer | None) -> None:
        assert pacer is not None
        pacers.append(pacer)
        raise StopRunError

    monkeypatch.setattr(PostOffice, "pace", pace)
    given = settings(deadline_s=60.0)
    control = RunControl()
    clients = [PostOffice().client("d1")]
    with RunStore(tmp_path / "runs.db") as store:
        federation = Federation(clients, ToyTask(), given, given.aggregator(), store, "r", control=control)
        with pytest.raises(StopRunError):
            federation.run()
        assert 22.5 <= pacers[0]("d1") <= 30.0
        control.set_deadline(20.0)
        asyncio.run(federation._apply_control())
        assert 7.5 <= pacers[0]("d1") <= 10.0
