"""The devices that a round asks: by their values in the draw, with the share that they check."""

from __future__ import annotations

import pytest

from fedbpt.coordinator.devices import fleet
from fedbpt.coordinator.devices.drafts import Draft
from fedbpt.device.agent.drawn import DrawCheck
from fedbpt.protocol.draws import Draw
from fedbpt.protocol.rounds import RoundPlan, RoundReport
from fedbpt.runs.events import DeviceLost
from tests.support.toy_scene import FlakyClient, Scene, closed
from tests.unit.coordinator.test_stragglers import HOUR, scene, searched

__all__ = ["scene"]

NAMES = [f"d{i}" for i in range(1000)]


def test_a_round_asks_the_devices_of_the_lowest_values_whatever_their_order() -> None:
    draft = Draft("r", 3, 5, size=20, n_devices=1000)
    cohort = draft.cohort(NAMES, wanted=16)
    values = [Draw("r", 3, 5).value(name) for name in cohort.order]
    assert values == sorted(values)
    assert (cohort.size, cohort.wanted, draft.share) == (20, 16, 0.06)
    assert cohort.order == draft.cohort(reversed(NAMES), wanted=16).order


def test_the_share_is_that_of_three_devices_for_each_asked_one() -> None:
    draft = Draft("r", 3, 5, size=20, n_devices=1000)
    cohort = draft.cohort(NAMES, wanted=16)
    drawn = cohort.order[: cohort.n_drawn]
    assert 40 < len(drawn) < 85
    assert {cohort.share(name) for name in drawn} == {0.06}
    assert [draft.draws(name) for name in cohort.order] == [True] * len(drawn) + [False] * (1000 - len(drawn))


def test_a_device_beyond_the_share_is_asked_with_one_that_is_twice_as_large_and_so_on() -> None:
    cohort = Draft("r", 3, 5, size=20, n_devices=1000).cohort(NAMES, wanted=16)
    shares = [cohort.share(name) for name in cohort.order]
    assert shares == sorted(shares)  # type: ignore[type-var]
    assert sorted(set(shares)) == [0.06, 0.12, 0.24, 0.48, 0.96, 1.0]  # type: ignore[type-var]
    draw = Draw("r", 3, 5)
    assert all(draw.value(name) < (cohort.share(name) or 0.0) for name in NAMES)


def test_a_small_fleet_is_drawn_from_all_of_it() -> None:
    cohort = Draft("r", 3, 5, size=2, n_devices=5).cohort("abcde", wanted=2)
    assert (cohort.n_drawn, {cohort.share(name) for name in "abcde"}) == (5, {1.0})


def test_drawn_devices_that_wait_are_asked_before_those_that_call_later(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = {"a", "d"}
    monkeypatch.setattr(type(scene.clients["a"]), "due_s", property(lambda client: 9.0 * (client.name in away)))
    scene.run(rounds=8, per_round=3, over_selection=0.0, stragglers=0.0)
    assert {event.reported for event in searched(scene)} == {("b", "c", "e")}


def test_where_too_few_wait_the_others_are_asked_as_soon_as_they_call(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedbpt.coordinator.devices.fleet.RECHECK_S", 0.01)
    away: set[str] = set()
    monkeypatch.setattr(type(scene.clients["a"]), "due_s", property(lambda client: 9.0 * (client.name in away)))
    scene.devices["a"].change = lambda report: away.clear() or report
    scene.when(closed(0), lambda: away.update("bcde"))
    scene.run(rounds=4, per_round=3, over_selection=0.0, stragglers=0.0)
    assert all(len(event.reported) == 3 for event in searched(scene))
    assert "a" in searched(scene)[0].reported


def test_a_round_with_a_quorum_waits_for_drawn_devices_that_are_about_to_call(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "RECHECK_S", 0.01)
    looks_left = 20
    reported = False

    def due_s(client: FlakyClient) -> float:
        nonlocal looks_left
        looks_left -= reported
        return 0.0 if client.name == "a" or looks_left < 0 else 9.0

    def report(made: RoundReport) -> RoundReport:
        nonlocal reported
        reported = True
        return made

    monkeypatch.setattr(FlakyClient, "due_s", property(due_s))
    scene.when(closed(0), lambda: setattr(scene.devices["a"], "change", report))
    scene.run(rounds=1, per_round=3, over_selection=0.0, stragglers=0.0, quorum=0.3, deadline_s=HOUR)
    (found,) = searched(scene)
    assert len(found.reported) == 3
    assert "a" in found.reported


def test_a_round_with_a_quorum_does_not_wait_for_devices_that_call_after_its_end(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FlakyClient, "due_s", property(lambda client: HOUR * (client.name != "a")))
    scene.run(rounds=2, per_round=3, over_selection=0.0, stragglers=0.0, quorum=0.3, deadline_s=HOUR / 2)
    assert [event.reported for event in searched(scene)] == [("a",)] * 2


@pytest.mark.timeout(60)
def test_a_round_with_a_quorum_does_not_wait_for_devices_that_call_and_are_told_another_time(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "RECHECK_S", 0.01)
    monkeypatch.setattr(FlakyClient, "due_s", property(lambda client: 0.1 * (client.name != "a")))
    scene.run(rounds=2, per_round=3, over_selection=0.0, stragglers=0.0, quorum=0.3, deadline_s=HOUR)
    assert [event.reported for event in searched(scene)] == [("a",)] * 2


def test_a_draw_of_nobody_is_a_draw(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def ordered(run: str) -> list[str]:
        return sorted("abcde", key=Draw(run, 3, 1).value)

    run = next(run for run in map(str, range(9999)) if Draw(run, 3, 1).value(ordered(run)[0]) >= 0.6)
    first, second, *_ = ordered(run)
    assert Draft(run, 3, 1, size=1, n_devices=5).cohort("abcde", wanted=1).n_drawn == 0
    monkeypatch.setattr(FlakyClient, "due_s", property(lambda client: 9.0 * (client.name == first)))
    scene.run(run, rounds=1, per_round=1, over_selection=0.0)
    assert [event.reported for event in searched(scene)] == [(second,)]


def test_beyond_the_draw_are_asked_only_as_many_as_it_lacks(scene: Scene) -> None:
    def drawn(round: int) -> set[str]:
        return {name for name in "abcde" if Draw("r", 3, round).value(name) < 0.6}

    last = next(round for round in range(2, 20) if 0 < len(drawn(round)) < 4)
    scene.when(closed(last - 1), lambda: [setattr(scene.clients[name], "down", True) for name in drawn(last)])
    scene.run(rounds=last, per_round=1, over_selection=0.0, quorum=0.2)
    others = set("abcde") - drawn(last)
    assert searched(scene)[-1].reported == (min(others, key=Draw("r", 3, last).value),)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, str]]:
    """The devices that have checked a draw, the shares, and what was wrong."""
    found: list[tuple[str, float, str]] = []
    check = DrawCheck.problem

    def problem(self: DrawCheck, plan: RoundPlan, share: float) -> str:
        said = check(self, plan, share)
        found.append((plan.device, share, said))
        return said

    monkeypatch.setattr(DrawCheck, "problem", problem)
    return found


def test_devices_check_that_they_were_drawn(scene: Scene, checked: list[tuple[str, float, str]]) -> None:
    scene.run(rounds=8, per_round=1, over_selection=0.0)
    assert [(name,) for name, _, _ in checked] == [event.reported for event in searched(scene)]
    assert {(share, problem) for _, share, problem in checked} <= {(0.6, ""), (1.0, "")}


def test_rounds_of_all_devices_are_not_drawn(scene: Scene, checked: list[tuple[str, float, str]]) -> None:
    scene.run(rounds=3)
    assert checked == []


def test_a_run_may_draw_a_random_order_as_before(scene: Scene, checked: list[tuple[str, float, str]]) -> None:
    scene.run(rounds=8, per_round=2, over_selection=0.0, draft="permutation")
    assert all(len(event.reported) == 2 for event in searched(scene))
    assert checked == []


def test_a_device_asked_out_of_turn_refuses_and_others_take_its_place(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Draft, "_share_with", lambda *_: 0.5)  # a coordinator that asks whom it likes
    scene.run(rounds=8, per_round=2, over_selection=0.0, quorum=0.2)
    reported = {(event.round, name) for event in searched(scene) for name in event.reported}
    assert all(Draw("r", 3, round).value(name) < 0.5 for round, name in reported)
    reasons = [event.reason for event in scene.of(DeviceLost)]
    assert reasons
    assert all("ask it in a round that draws it" in reason for reason in reasons)


def test_the_missing_of_a_drafted_round_are_those_it_asked(scene: Scene) -> None:
    scene.when(closed(0), lambda: setattr(scene.devices["b"], "fail", ValueError("broken")))
    scene.run(rounds=12, per_round=3, over_selection=0.0, quorum=0.3)
    missing = {event.missing for event in searched(scene)}
    assert ("b",) in missing
    assert missing <= {(), ("b",)}
