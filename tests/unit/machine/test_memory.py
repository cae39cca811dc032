"""The KV budget within a memory limit."""

from __future__ import annotations

from fedbpt.errors import ConfigError
from fedbpt.machine.memory import INTERPRETER_BYTES, WEIGHTS_ALLOWANCE, kv_budget_within
from tests.support.raises import raises

MIB = 2**20
WEIGHTS = 100 * MIB
TAKEN = INTERPRETER_BYTES + int(WEIGHTS_ALLOWANCE * WEIGHTS)


def test_the_kv_gets_what_the_model_leaves_and_never_more_than_it_wants() -> None:
    assert kv_budget_within(TAKEN + 20 * MIB, WEIGHTS, 512 * MIB) == 20 * MIB
    assert kv_budget_within(TAKEN + 20 * MIB, WEIGHTS, 5 * MIB) == 5 * MIB
    assert kv_budget_within(TAKEN, WEIGHTS, 512 * MIB) == 0


def test_a_limit_that_the_model_exceeds_names_the_least_that_would_do() -> None:
    with raises(ConfigError, field="--max-memory", limit=179):
        kv_budget_within(100 * MIB, WEIGHTS, 0)
    assert kv_budget_within(179 * MIB, WEIGHTS, 0) == 0
