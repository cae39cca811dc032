"""A device checks that it was drawn, and logs what would let it be asked more often."""

from __future__ import annotations

import logging

import msgspec
import pytest

from fedbpt.device.agent.drawn import MAX_RUNS, DrawCheck
from fedbpt.protocol.draws import Draw
from fedbpt.protocol.rounds import RoundPlan
from tests.contract.test_clients import plan


def value(plan: RoundPlan) -> float:
    return Draw(plan.run, plan.seed, plan.round).value(plan.device)


def test_a_device_is_drawn_below_the_share_and_not_at_or_above_it() -> None:
    check = DrawCheck()
    assert check.problem(plan(), value(plan()) + 1e-9) == ""
    assert "ask it in a round that draws it" in check.problem(plan(), value(plan()))
    assert "round 1 of run" in check.problem(plan(), value(plan()) / 2)


@pytest.mark.parametrize(
    ("change", "share", "level", "text"),
    [
        ({"round": 2}, 0.999, None, ""),
        ({"round": 2}, 1.0, logging.WARNING, "up to 100 %"),
        ({"seed": 99}, 0.999, logging.WARNING, "has changed its seed"),
        ({"device": "other"}, 0.999, logging.WARNING, "this device's name"),
        ({"run": "another"}, 0.999, logging.INFO, "at most 99.9 %"),
    ],
)
def test_what_would_let_it_be_asked_more_often_is_logged(
    change: dict[str, object], share: float, level: int | None, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    check = DrawCheck()
    assert check.problem(plan(), 0.999) == ""
    caplog.clear()
    for _ in range(2):
        assert check.problem(msgspec.structs.replace(plan(), **change), share) == ""
    assert [record.levelno for record in caplog.records] == ([] if level is None else [level])
    assert text in caplog.text


def test_a_limited_number_of_runs_is_remembered() -> None:
    check = DrawCheck()
    for i in range(2 * MAX_RUNS):
        check.problem(msgspec.structs.replace(plan(), run=f"r{i}"), 1.0)
    assert len(check.known) == MAX_RUNS
