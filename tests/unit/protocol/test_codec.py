"""Messages survive the wire, and malformed ones are refused with `WireError`."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbpt.errors import WireError
from fedbpt.plain_text import MOST_TOLD
from fedbpt.protocol import codec
from fedbpt.protocol.questions import Answer, check_answer
from fedbpt.protocol.rounds import (
    DeviceInfo,
    ErrorReply,
    EvaluateRequest,
    FitResult,
    FitWork,
    LocalResult,
    PooledResult,
    PooledWork,
    RoundPlan,
    RoundProgress,
    RoundReport,
    SearchState,
)
from fedbpt.protocol.specs import Array, Message, ObjectiveSpec, PromptSpec, Readout, Template
from tests.support.fake_device import TOY
from tests.support.raises import raises


def plan(**changes: object) -> RoundPlan:
    made = RoundPlan(
        run="r",
        round=1,
        device="a",
        seed=0,
        model_fingerprint="sha256:0",
        task=TOY,
        labels=("x", "y"),
        template=Template(pattern="{text} It was", label_words=(" bad", " good")),
        prompt=PromptSpec(d=3),
        objective=ObjectiveSpec(),
        work=PooledWork(state=SearchState(mean=Array.of(np.zeros(3)), sigma=1.0), generation=0, popsize=4),
    )
    return msgspec.structs.replace(made, **changes)


def info() -> dict[str, object]:
    return {
        "name": "a", "version": "0", "model_fingerprint": "sha256:0", "model_name": "m", "backend": "cpu", "n_train": 1,
        "n_dev": 0, "n_test": 0, "ram_bytes": 1, "rss_bytes": 1, "peak_rss_bytes": 1,
    }  # fmt: skip


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
    assert codec.decode(codec.encode(plan()), RoundPlan) == plan()
    assert codec.decode_json(codec.encode_json(plan()), RoundPlan) == plan()


OTHERS = tuple(Template(pattern=f"{{text}} {i}:", label_words=(" a", " b")) for i in range(2))


def readout(n_words: int, n_others: int = 2) -> Readout:
    own, *others = (
        Array.of(v, "<f4") for v in np.arange(2.0 * (1 + n_words) * (1 + n_others)).reshape(-1, 1 + n_words, 2)
    )
    return Readout(weights=own, others=tuple(others))


def fit_work(n_words: int, **changes: object) -> FitWork:
    centre = Array.of(np.ones(3 * n_words), "<f4") if n_words else None
    made = FitWork(
        purpose="readout", latent=Array.of(np.zeros(3)), n_words=n_words, readout=readout(n_words), centre=centre,
        others=OTHERS,
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def evaluation(**changes: object) -> EvaluateRequest:
    made = EvaluateRequest(
        model_fingerprint="sha256:0", task=TOY, labels=("x", "y"), template=plan().template, prompt=PromptSpec(d=3),
        objective=ObjectiveSpec(), latents=Array.of(np.zeros((2, 3))), readouts=(None, readout(4)), others=OTHERS,
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


@pytest.mark.parametrize(
    "message",
    [
        plan(work=fit_work(4)),
        plan(work=fit_work(0)),
        plan(work=fit_work(4, readout=None, centre=None)),
        plan(work=fit_work(4, others=(), readout=readout(4, 0))),
        report(result=FitResult(purpose="readout", loss=0.5, means=Array.of(np.ones((3, 5, 2)), "<f2"))),
        report(result=FitResult(purpose="readout", loss=0.5, means=Array.of(np.ones((3, 1)), "<f4"))),
        evaluation(),
        evaluation(readouts=(None, readout(0)), others=OTHERS),
        evaluation(readouts=(), others=()),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_of_several_templates_survive_msgpack_and_json(message: Message) -> None:
    kind = type(message)
    assert codec.decode(codec.encode(message), kind) == message
    assert codec.decode_json(codec.encode_json(message), kind) == message
    assert codec.digest(codec.decode(codec.encode(message), kind)) == codec.digest(message)


def test_the_other_templates_and_their_readouts_are_part_of_a_plans_digest() -> None:
    moved = Readout(weights=readout(4).weights, others=readout(4).others[::-1])
    plans = [plan(work=fit_work(4, **changes)) for changes in ({}, {"others": OTHERS[::-1]}, {"readout": moved})]
    assert len({codec.digest(one) for one in plans}) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e12])
def test_impossible_numbers_are_refused_in_other_templates_readouts(value: float) -> None:
    bad = Readout(weights=readout(4).weights, others=(readout(4).weights, Array.of(np.full((5, 2), value))))
    for message in (plan(work=fit_work(4, readout=bad)), evaluation(readouts=(None, bad))):
        with pytest.raises(WireError, match="others"):
            codec.decode(codec.encode(message), type(message))


def test_messages_that_name_no_other_templates_are_read_as_having_none() -> None:
    for message in (fit_work(4), readout(4), evaluation()):
        fields = msgspec.to_builtins(message, builtin_types=(bytes,))
        del fields["others"]
        assert codec.decode(msgspec.msgpack.encode(fields), type(message)).others == ()


def test_the_digest_is_the_same_for_what_was_sent_and_what_was_received() -> None:
    sent = plan(prompt=PromptSpec(d=3, alpha=1, sigma0=2), deadline_s=30)  # ints in float fields
    received = codec.decode(codec.encode(sent), RoundPlan)
    assert codec.digest(sent) == codec.digest(received)
    assert codec.digest(sent) != codec.digest(plan())


@pytest.mark.parametrize(
    "body",
    [b"", b"\xc1", b"\x80", b"hello", msgspec.msgpack.encode([1]), b"\x91" * 5000, codec.encode(plan())[:-3]],
)
def test_a_malformed_body_is_refused(body: bytes) -> None:
    with pytest.raises(WireError, match="RoundPlan"):
        codec.decode(body, RoundPlan)
    with pytest.raises(WireError, match="RoundPlan"):
        codec.decode_json(body, RoundPlan)


def test_an_unknown_field_is_refused() -> None:
    body = msgspec.msgpack.encode({"code": "a", "message": "b", "extra": 1})
    with pytest.raises(WireError, match="extra"):
        codec.decode(body, ErrorReply)


def test_another_protocol_version_is_refused() -> None:
    body = msgspec.msgpack.encode({**msgspec.to_builtins(report(), builtin_types=(bytes,)), "protocol": 2})
    with pytest.raises(WireError, match="protocol"):
        codec.decode(body, RoundReport)


def test_a_body_over_the_limit_is_refused_before_it_is_read() -> None:
    with raises(WireError, limit=10):
        codec.decode(b"\x00" * 11, RoundPlan, limit=10)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_anywhere(value: float) -> None:
    in_array = report(result=PooledResult(losses=Array.of(np.array([0.0, value]))))
    in_float = report(seconds=value)
    nested = report(result=LocalResult(mean=Array.of(np.zeros(2)), fitness=value, sigma_squares=1.0))
    for bad, where in ((in_array, "losses"), (in_float, "seconds"), (nested, "fitness")):
        with pytest.raises(WireError, match=where):
            codec.decode(codec.encode(bad), RoundReport)


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
        codec.decode(codec.encode(report(result=PooledResult(losses=array))), RoundReport)


@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_but_wire_error(body: bytes) -> None:
    for kind in (RoundPlan, RoundReport, EvaluateRequest, DeviceInfo):
        for decode in (codec.decode, codec.decode_json):
            with pytest.raises(WireError):
                decode(body, kind)


@given(st.data())
def test_a_damaged_plan_is_refused_or_read_but_never_crashes(data: st.DataObject) -> None:
    body = bytearray(codec.encode(plan()))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = codec.decode(bytes(body), RoundPlan)
    except WireError:
        return
    assert codec.digest(read)


# --- text for people -------------------------------------------------------------------------------------------------

LONG = "\x1b]0;owned\x07 " * 2**16


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (ErrorReply, {"code": LONG, "message": LONG}),
        (RoundProgress, {"run": "r", "round": 1, "state": "failed", "error": LONG, "paused": LONG}),
        (DeviceInfo, {**info(), "version": LONG, "model_name": LONG, "backend": LONG, "paused": LONG}),
    ],
)
def test_free_text_for_people_is_truncated_and_plain(kind: type[Message], fields: dict[str, object]) -> None:
    for decode, encode in ((codec.decode, msgspec.msgpack.encode), (codec.decode_json, msgspec.json.encode)):
        message = decode(encode(fields), kind)
        for name in (name for name, value in fields.items() if value is LONG):
            text = getattr(message, name)
            assert len(text) <= MOST_TOLD
            assert f"{len(LONG):,} characters" in text
            assert "\x1b" not in text


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (DeviceInfo, {"name": "device\n"}),
        (DeviceInfo, {"model_fingerprint": "x" * 129}),
        (DeviceInfo, {"model_fingerprint": "sha256:\x1b"}),
        (DeviceInfo, {LONG: 1}),
        (RoundReport, {"plan_digest": "0" * 129}),
        (RoundReport, {"result": {"type": LONG}}),
        (Answer, {"texts": ("", "x" * (2**20 + 1))}),
        (Answer, {"probabilities": ((0.5,), (0.5,), (0.5,))}),
        (Answer, {"probabilities": ((1.5,), (0.5,))}),
    ],
)
def test_invalid_names_and_numbers_are_refused_in_a_short_line(kind: type[Message], change: dict[str, object]) -> None:
    whole = {DeviceInfo: info(), RoundReport: msgspec.to_builtins(report()), Answer: {}}[kind]
    with pytest.raises(WireError) as caught:
        codec.decode(msgspec.msgpack.encode({**whole, **change}), kind)
    assert len(str(caught.value)) <= MOST_TOLD + 40
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("probabilities", [(), ((0.5, 0.5),), ((0.5, 0.5), (1.0,)), ((1.0,), (1.0,))])
def test_an_answer_without_each_labels_probabilities_is_refused(probabilities: tuple[tuple[float, ...], ...]) -> None:
    with pytest.raises(WireError):
        check_answer(Answer(probabilities=probabilities, done=True), ("x", "y"))
    check_answer(Answer(probabilities=((0.5, 0.5), (0.1, 0.9)), done=True), ("x", "y"))
    check_answer(Answer(texts=("a", "b"), done=True), ())
