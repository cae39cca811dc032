"""Compact plans and reports: the receiver expands them to the same bits, or reports that it cannot."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from fedbpt.aggregation.fedavg import FedAvg
from fedbpt.aggregation.fedbpt import FedBPT
from fedbpt.aggregation.pooled import Pooled
from fedbpt.errors import DeviceRefusedError, WireError
from fedbpt.protocol.codec import encode
from fedbpt.protocol.rounds import RanksResult, RoundPlan, RoundReport, Work
from fedbpt.protocol.specs import Array, ObjectiveSpec, PromptSpec, Template
from fedbpt.search.compact_plans import Replayer, may_shorten, short_plan, short_report, whole_report
from fedbpt.search.local_search import local_search, local_seed
from tests.support.fake_device import TOY
from tests.support.raises import raises
from tests.support.toy_federation import answer, report

D, SEED = 320, 5  # of two-point step sizes, whose pair is a part of the state


def plan(work: Work, round: int = 1) -> RoundPlan:
    return RoundPlan(
        run="r",
        round=round,
        device="a",
        seed=SEED,
        model_fingerprint="sha256:0",
        task=TOY,
        labels=("x", "y"),
        template=Template(pattern="{text} It was", label_words=(" bad", " good")),
        prompt=PromptSpec(d=D),
        objective=ObjectiveSpec(),
        work=work,
    )


def loss(latents: np.ndarray) -> np.ndarray:
    return np.asarray(((latents - 0.3) ** 2).sum(axis=1))


def step(search: Pooled, round: int) -> None:
    search.update([answer(search.work(round), "a", round, loss, SEED)])


def test_a_device_makes_each_generation_from_the_latest_ranks():
    search, device, known = Pooled(D, popsize=6, seed=SEED), Replayer(), 0
    for round in range(5):
        wanted = plan(search.work(round), round)
        short = short_plan(wanted, search.history(), known)
        assert device.whole(short) == wanted
        assert device.whole(short) == wanted  # the answer was lost, the plan comes again
        assert len(encode(short)) < len(encode(wanted)) / 4
        known = round
        step(search, round)


def test_a_device_that_missed_some_rounds_gets_all_their_ranks():
    search, device = Pooled(D, popsize=6, seed=SEED), Replayer()
    device.whole(short_plan(plan(search.work(0)), search.history(), 0))
    for round in range(4):
        step(search, round)
    wanted = plan(search.work(4), 4)
    assert device.whole(short_plan(wanted, search.history(), 0)) == wanted


def test_a_device_that_lost_its_search_requests_all_ranks():
    search = Pooled(D, popsize=6, seed=SEED)
    for round in range(3):
        step(search, round)
    wanted, new = plan(search.work(3), 3), Replayer()
    with raises(DeviceRefusedError, code="unknown-search"):
        new.whole(short_plan(wanted, search.history(), 2))
    assert new.whole(short_plan(wanted, search.history(), 0)) == wanted


def test_a_restarted_search_is_replayed_from_its_own_start():
    search, device = Pooled(D, popsize=6, seed=SEED), Replayer()
    for round in range(3):
        step(search, round)
    device.whole(short_plan(plan(search.work(3)), search.history(), 0))
    search.restart(np.linspace(-1, 1, D))
    for round in range(3, 5):
        step(search, round)
    wanted, history = plan(search.work(5), 5), search.history()
    assert history.first == 3
    assert len(history.ranks) == 2 * 6
    assert device.whole(short_plan(wanted, history, history.first)) == wanted


def test_another_state_is_refused_and_forgotten():
    search, device = Pooled(D, popsize=6, seed=SEED), Replayer()
    step(search, 0)
    wanted = plan(search.work(1), 1)
    other = msgspec.structs.replace(search.history(), ranks=bytes([5, 4, 3, 2, 1, 0]))
    with raises(DeviceRefusedError, code="replay-differs"):
        device.whole(short_plan(wanted, other, 0))
    assert device.whole(short_plan(wanted, search.history(), 0)) == wanted


@pytest.mark.parametrize("ranks", [b"\x00\x01\x02", b"\x00\x00\x01\x02\x03\x04", b"\x00\x01\x02\x03\x04\x06"])
def test_malformed_ranks_are_refused(ranks: bytes):
    search = Pooled(D, popsize=6, seed=SEED)
    history = msgspec.structs.replace(search.history(), ranks=ranks)
    with raises(WireError, field="ranks"):
        Replayer().whole(short_plan(plan(search.work(0)), history, 0))


def test_a_compact_plan_requires_no_more_work_than_a_full_one_could():
    search = Pooled(D, popsize=6, seed=SEED)
    short = short_plan(plan(search.work(0)), search.history(), 0)
    full = msgspec.structs.replace(short.work, history=msgspec.structs.replace(short.work.history, covariance="full"))
    vast = msgspec.structs.replace(short, prompt=PromptSpec(d=10**6), work=full)
    with raises(WireError, field="ranks"):
        Replayer().whole(vast)
    long = msgspec.structs.replace(search.history(), ranks=bytes(range(6)) * (12 * D))
    with raises(WireError, field="ranks"):
        Replayer().whole(short_plan(plan(search.work(0)), long, 0))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sigma0": 5e-324}, "sigma0"),
        ({"sigma0": 1e-200}, "sigma0"),
        ({"sigma0": 1.7e308}, "sigma0"),
        ({"start": Array.of(np.full(D, 1e9)), "ranks": b""}, ""),  # with ranks it would come back into bounds
    ],
)
def test_a_search_whose_state_exceeds_a_message_is_refused_and_forgotten(changes: dict[str, Any], field: str):
    search, device = Pooled(D, popsize=6, seed=SEED), Replayer()
    wanted = plan(search.work(0))
    short = short_plan(wanted, search.history(), 0)
    history = msgspec.structs.replace(search.history(), **{"ranks": bytes(range(6)) * 8, **changes})
    with raises(WireError, field=field):
        device.whole(msgspec.structs.replace(short, work=msgspec.structs.replace(short.work, history=history)))
    assert device.whole(short) == wanted


def test_populations_over_a_byte_have_no_compact_form():
    assert Pooled(8, popsize=257).history() is None
    assert FedAvg(8).history() is None


def local_report(asked: RoundPlan) -> RoundReport:
    found = local_search(asked.work, local_seed(asked), lambda latents, _: loss(latents))
    return report("a", 1, found.with_fitness(0.25))


def test_a_coordinator_repeats_a_local_search_from_its_ranks():
    asked = plan(FedAvg(D, popsize=6, iterations=4).work(1))
    whole = local_report(asked)
    short = short_report(whole)
    assert len(encode(short)) < len(encode(whole)) / 6
    assert whole_report(short, asked) == whole
    assert whole_report(whole, asked) == whole


def test_a_local_search_with_a_different_result_is_not_used():
    asked = plan(FedAvg(D, popsize=6, iterations=4).work(1))
    short = short_report(local_report(asked))
    assert isinstance(short.result, RanksResult)
    elsewhere = msgspec.structs.replace(short.result, check=32 * "0")
    assert whole_report(msgspec.structs.replace(short, result=elsewhere), asked) is None
    fewer = msgspec.structs.replace(short.result, ranks=short.result.ranks[:6])
    with raises(WireError, field="ranks"):
        whole_report(msgspec.structs.replace(short, result=fewer), asked)


def test_only_cheap_searches_are_repeated():
    assert may_shorten(FedAvg(D).work(1))
    assert not may_shorten(FedBPT(8).work(1))
    assert not may_shorten(Pooled(D).work(1))
