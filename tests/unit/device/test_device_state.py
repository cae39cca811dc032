"""A device's state survives its process in a snapshot."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from fedbpt.device.device import Device
from fedbpt.device.state import DeviceState, Snapshot
from fedbpt.errors import WireError
from fedbpt.protocol import codec
from tests.support.toy_scene import ToyTask
from tests.support.toy_scorer import ToyScorer
from tests.unit.device import test_local_fit
from tests.unit.device.test_device import ROWS, TASK
from tests.unit.objective import test_privacy


def restarted(device: Device, rows: list[Any], task: Any) -> Device:
    return Device(device.name, ToyScorer(), rows, task=task, state=DeviceState.from_bytes(device.state.to_bytes()))


def test_a_restarted_device_repeats_private_losses_with_the_same_noise() -> None:
    first = test_privacy.device()
    answer = test_privacy.losses_of(first.run(test_privacy.plan()))
    assert (
        test_privacy.losses_of(restarted(first, test_privacy.ROWS, ToyTask()).run(test_privacy.plan())) == answer
    ).all()
    assert (test_privacy.losses_of(test_privacy.device().run(test_privacy.plan())) != answer).any()


def test_a_restarted_device_continues_a_fit_without_scoring_again() -> None:
    first = Device("kitchen", ToyScorer(), ROWS, task=TASK)
    result = first.run(test_local_fit.asked()).result
    again = restarted(first, ROWS, TASK)
    assert again.run(test_local_fit.asked()).result == result
    assert isinstance(again.scorer, ToyScorer)
    assert not again.scorer.calls


def test_logits_too_large_for_a_message_are_left_out_and_the_rest_is_kept() -> None:
    state = DeviceState(tokens_per_second=3.0, fitted_to=b"q", fitted=np.zeros((1, 2**20, 4), dtype=np.float32))
    kept = DeviceState.from_bytes(state.to_bytes())
    assert (kept.key, kept.tokens_per_second, kept.fitted_to, kept.fitted) == (state.key, 3.0, b"", None)


@pytest.mark.parametrize(
    "damage", [lambda body: body[:-1], lambda _body: codec.encode(Snapshot(key=b"short")), lambda _body: b""]
)
def test_a_damaged_snapshot_is_refused(damage) -> None:
    with pytest.raises(WireError):
        DeviceState.from_bytes(damage(DeviceState().to_bytes()))


def test_the_key_is_not_shown() -> None:
    state = DeviceState(key=32 * b"k")
    assert "kkk" not in repr(state)
    assert msgspec.msgpack.decode(state.to_bytes())["key"] == state.key
