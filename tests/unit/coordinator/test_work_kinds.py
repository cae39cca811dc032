"""The registry of work kinds."""

from __future__ import annotations

from typing import get_args

from fedbpt.coordinator.work_kinds import KINDS
from fedbpt.protocol.rounds import MaskedResult, RanksResult, ReplayWork, Result, Work


def test_every_type_of_work_and_result_has_a_kind_except_the_short_and_masked_forms() -> None:
    assert {kind.work for kind in KINDS} == set(get_args(Work)) - {ReplayWork}
    assert {kind.result for kind in KINDS} == set(get_args(Result)) - {RanksResult, MaskedResult}
    assert len(KINDS) == len({kind.work for kind in KINDS}) == len({kind.result for kind in KINDS})
