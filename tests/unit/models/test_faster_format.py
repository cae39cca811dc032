"""Advice on changing a model's format for this CPU, with fake speeds."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from fedbpt.models import FORMATS, WeightFormat, faster_format

M = 1_000_000
BITS = {"q4_0": 4.5, "q4_1": 5.0, "q5_0": 5.5, "q4_K": 4.5, "q2_K": 2.625, "q6_K": 6.5625, "q8_0": 8.5, "f16": 16.0}
FLOPS = dict.fromkeys(BITS, 100.0)


def model(**millions: int) -> list[WeightFormat]:
    return [WeightFormat(type, n * M, int(n * M * BITS[type] / 8)) for type, n in millions.items()]


def advice(weights: list[WeightFormat], **flops: float) -> str | None:
    return faster_format("my model.gguf", weights, lambda types: {type: {**FLOPS, **flops}[type] for type in types})


def test_a_slow_format_is_named_with_the_command_that_changes_it() -> None:
    line = advice(model(q4_1=1060), q4_1=40.0)
    assert line is not None
    assert [value for value in ("q4_0", " 2.5 times", "100 % q4_1") if value not in line] == []
    assert "`fedbpt models requantize 'my model.gguf' q4_0`" in line
    assert len(line.splitlines()) == 1


def test_a_small_speedup_is_not_advised() -> None:
    assert advice(model(q4_1=1060), q4_1=70.0) is None
    assert advice(model(q4_1=1060), q4_1=66.0) is not None


def test_one_measurement_is_not_enough() -> None:
    measured = iter([{**FLOPS, "q4_1": 20.0}, {**FLOPS, "q4_1": 30.0}, FLOPS])
    assert faster_format("my model.gguf", model(q4_1=106), lambda _types: next(measured)) is None
    measured = iter([{**FLOPS, "q4_1": 20.0}, {**FLOPS, "q4_1": 50.0}, {**FLOPS, "q4_1": 25.0}])
    line = faster_format("my model.gguf", model(q4_1=106), lambda _types: next(measured))
    assert line is not None
    assert " 2.0 times" in line


def test_each_type_counts_by_its_share_of_the_work() -> None:
    mixed = model(q5_0=60, q4_K=40)  # 60 / 25 + 40 / 100 = 2.8 times the 100 / 100 of q4_0
    line = advice(mixed, q5_0=25.0)
    assert line is not None
    assert " 2.8 times" in line
    assert "60 % q5_0" in line
    assert advice(model(q4_K=95, q5_0=5), q5_0=25.0) is None


def test_the_file_hardly_grows() -> None:
    assert advice(model(q2_K=1000), q2_K=10.0) is None
    assert advice(model(q6_K=1000), q6_K=10.0, q8_0=1000.0, q4_0=10.0) is None
    assert " q8_0`" in (advice(model(q5_0=100), q5_0=40.0) or "")  # 38 MB more


def test_the_format_that_loses_less_comes_first() -> None:
    assert " q8_0`" in (advice(model(f16=100), f16=40.0, q4_0=200.0) or "")
    assert " q4_0`" in (advice(model(f16=100), f16=80.0, q4_0=200.0) or "")


def test_a_model_in_a_fast_format_needs_no_advice() -> None:
    assert advice(model(q4_0=100)) is None
    assert advice(model(q8_0=100), q4_0=110.0) is None


@pytest.mark.parametrize("weights", [[], model(q4_1=1), model(q2_K=1000)])
def test_a_model_that_is_small_or_packed_tightly_is_not_even_measured(weights: list[WeightFormat]) -> None:
    def never(_types: Collection[str]) -> dict[str, float]:
        pytest.fail("measured")

    assert faster_format("tiny", weights, never) is None


def test_what_is_advised_can_be_written() -> None:
    assert {"q4_0", "q8_0"} <= set(FORMATS)
