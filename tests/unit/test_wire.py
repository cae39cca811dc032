from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbpt import wire
from fedbpt.errors import WireError
from fedbpt.messages import (
    Array,
    DeviceInfo,
    ErrorReply,
    EvaluateRequest,
    LocalResult,
    ObjectiveSpec,
    PooledResult,
    PooledWork,
    PromptSpec,
    RoundPlan,
    RoundReport,
    SearchState,
    Template,
)


def plan(**changes: object) -> RoundPlan:
    made = RoundPlan(
        run="r",
        round=1,
        device="a",
        seed=0,
        model_fingerprint="sha256:0",
        labels=("x", "y"),
        template=Template(pattern="{text} It was", label_words=(" bad", " good")),
        prompt=PromptSpec(d=3),
        objective=ObjectiveSpec(),
        work=PooledWork(state=SearchState(mean=Array.of(np.zeros(3)), sigma=1.0), generation=0, popsize=4),
    )
    return msgspec.structs.replace(made, **changes)


def report(**changes: object) -> RoundReport:
    made = RoundReport(
        run="r",
        round=1,
        device="a",
        plan_digest="0",
        result=PooledResult(losses=Array.of(np.arange(4.0))),
        n_texts=1,
        evaluations=4,
        tokens=9,
        seconds=0.5,
        peak_rss_bytes=1,
    )
    return msgspec.structs.replace(made, **changes)


def test_a_message_survives_msgpack_and_json() -> None:
    assert wire.decode(wire.encode(plan()), RoundPlan) == plan()
    assert wire.decode_json(wire.encode_json(plan()), RoundPlan) == plan()


def test_the_digest_is_the_same_for_what_was_sent_and_what_was_received() -> None:
    sent = plan(prompt=PromptSpec(d=3, alpha=1, sigma0=2), deadline_s=30)  # ints in float fields
    received = wire.decode(wire.encode(sent), RoundPlan)
    assert wire.digest(sent) == wire.digest(received)
    assert wire.digest(sent) != wire.digest(plan())


@pytest.mark.parametrize(
    "body",
    [b"", b"\xc1", b"\x80", b"hello", msgspec.msgpack.encode([1]), b"\x91" * 5000, wire.encode(plan())[:-3]],
)
def test_a_body_that_is_no_such_message_is_refused(body: bytes) -> None:
    with pytest.raises(WireError, match="RoundPlan"):
        wire.decode(body, RoundPlan)
    with pytest.raises(WireError, match="RoundPlan"):
        wire.decode_json(body, RoundPlan)


def test_an_unknown_field_is_refused() -> None:
    body = msgspec.msgpack.encode({"code": "a", "message": "b", "extra": 1})
    with pytest.raises(WireError, match="extra"):
        wire.decode(body, ErrorReply)


def test_another_protocol_version_is_refused() -> None:
    body = msgspec.msgpack.encode({**msgspec.to_builtins(report(), builtin_types=(bytes,)), "protocol": 2})
    with pytest.raises(WireError, match="protocol"):
        wire.decode(body, RoundReport)


def test_a_body_over_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(WireError, match="limit of 10"):
        wire.decode(b"\x00" * 11, RoundPlan, limit=10)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_wherever_they_stand(value: float) -> None:
    in_array = report(result=PooledResult(losses=Array.of(np.array([0.0, value]))))
    in_float = report(seconds=value)
    nested = report(result=LocalResult(mean=Array.of(np.zeros(2)), fitness=value, sigma_squares=1.0))
    for bad, where in ((in_array, "losses"), (in_float, "seconds"), (nested, "fitness")):
        with pytest.raises(WireError, match=where):
            wire.decode(wire.encode(bad), RoundReport)


@pytest.mark.parametrize(
    "array",
    [
        Array(dtype="<f8", shape=(2,), data=b"\x00" * 15),
        Array(dtype="<f4", shape=(2**40, 2**40), data=b""),
        Array(dtype="<f8", shape=(1,) * 100, data=b"\x00" * 8),
        Array(dtype="<f8", shape=(0, 2**63 - 1, 2**63 - 1), data=b""),
        Array.of(np.full(3, 1e9)),
        Array.of(np.full(3, 1e200)),
    ],
)
def test_an_array_that_does_not_fit_or_is_huge_is_refused(array: Array) -> None:
    with pytest.raises(WireError, match="losses"):
        wire.decode(wire.encode(report(result=PooledResult(losses=array))), RoundReport)


@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_but_wire_error(body: bytes) -> None:
    for kind in (RoundPlan, RoundReport, EvaluateRequest, DeviceInfo):
        for decode in (wire.decode, wire.decode_json):
            with pytest.raises(WireError):
                decode(body, kind)


@given(st.data())
def test_a_damaged_plan_is_refused_or_read_but_never_crashes(data: st.DataObject) -> None:
    body = bytearray(wire.encode(plan()))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = wire.decode(bytes(body), RoundPlan)
    except WireError:
        return
    assert wire.digest(read)
