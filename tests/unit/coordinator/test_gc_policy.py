"""Full garbage collections happen between rounds."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from fedbpt.coordinator import gc_policy
from fedbpt.coordinator.gc_policy import MAX_SHARE, NEVER, NORMAL, collect_between_rounds, collect_normally
from fedbpt.runs.events import RunFinished
from tests.unit.display.test_display import closed, result, started


class Cycle:
    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


def test_old_objects_are_collected_only_when_a_round_has_closed() -> None:
    collect_between_rounds(started())
    assert gc.get_threshold()[2] == NEVER
    old = Cycle()
    for _ in range(3):
        gc.collect(1)  # moves it to the oldest generation
    gone = weakref.ref(old)
    del old
    gc.collect(1)
    assert gone() is not None
    collect_between_rounds(closed(1))
    assert gone() is None


def test_collections_take_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, collected = 1000.0, []

    def collect() -> None:
        nonlocal now
        collected.append(now)
        now += 1.0

    monkeypatch.setattr(gc_policy.time, "monotonic", lambda: now)
    monkeypatch.setattr(gc_policy.gc, "collect", collect)
    collect_between_rounds(started())
    for round in range(1, 101):
        collect_between_rounds(closed(round))
        now += 9.0
    assert collected[0] == 1000.0
    assert len(collected) == 1 + int((now - 1000.0) * MAX_SHARE)
    collect_between_rounds(started())  # another run: its first round collects
    collect_between_rounds(closed(1))
    assert collected[-1] == now - 1.0


def test_thresholds_are_restored_after_the_run() -> None:
    collect_between_rounds(started())
    collect_between_rounds(RunFinished(result=result()))
    assert gc.get_threshold() == NORMAL


def test_what_a_run_leaves_is_collected_before_the_next_one_freezes_it() -> None:
    run = Cycle()
    gone = weakref.ref(run)
    collect_between_rounds(started())
    del run
    collect_normally()
    assert gone() is None
    assert (gc.get_threshold(), gc.get_freeze_count()) == (NORMAL, 0)
