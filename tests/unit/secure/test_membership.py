"""How a device's owner decides about secure aggregation."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbpt.device.device import Device
from fedbpt.errors import ConfigError, InputError
from fedbpt.secure import keys
from fedbpt.secure.membership import Membership, identity_line, read_trusted
from tests.support.raises import raises
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows
from tests.unit.coordinator.test_report_bounds import POOLED


def test_lines_that_devices_print_are_read(tmp_path: Path) -> None:
    made = {name: keys.identity_of(keys.new_key()) for name in ("device-0", "b.c")}
    path = tmp_path / "peers.toml"
    path.write_text("\n".join(identity_line(name, identity) for name, identity in made.items()))
    assert read_trusted(path) == made


@pytest.mark.parametrize("content", ["a = 3", 'a = "x"', 'a = "AAAA"', "a =", '"a" = ["x"]'])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "peers.toml"
    path.write_text(content)
    with raises(ConfigError, field="--trust"):
        read_trusted(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with raises(ConfigError, field="--trust"):
        read_trusted(tmp_path / "absent.toml")


def test_a_device_may_answer_in_sums_only() -> None:
    device = Device("a", ToyScorer(), rows(8), task=TASK, membership=Membership(only=True))
    with raises(InputError, field="secure"):
        device.run(POOLED)


def test_an_identity_stays_the_same() -> None:
    private = keys.new_key()
    devices = [Device("a", ToyScorer(), rows(8), task=TASK, membership=Membership(private)) for _ in range(2)]
    assert devices[0].identity == devices[1].identity == keys.identity_of(private)
    assert private.hex() not in repr(devices[0].__dict__)
