"""`fedbpt.bench.measurement.measure` with the real scorer; its results are tested with the toy scorer."""

from __future__ import annotations

import pytest
from tiny_case import Case

from fedbpt.bench.measurement import KERNELS, measure


def test_a_real_scorer_can_be_measured(llama: Case) -> None:
    found = measure(llama.scorer, seconds=0.0)
    assert found.weights == {"f32": 1.0}
    assert found.prefill.tokens_per_second * found.prefill.seconds_per_call == pytest.approx(512)
    assert found.cue.tokens_per_second * found.cue.seconds_per_call == pytest.approx(16 * 8)
    assert list(found.kernel_flops_per_second) == [*KERNELS, "f32"]
    assert min(found.kernel_flops_per_second.values()) > 0
    assert found.memory_bytes["kv"] > 0
