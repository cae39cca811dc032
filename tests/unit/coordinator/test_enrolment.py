"""The devices that may call in: one-time invitations, tokens by digest, revocation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedbpt.coordinator.devices.enrolment import INVITATION_S, DeviceRegistry
from fedbpt.errors import ConfigError, CoordinatorRefusedError, StoreError
from fedbpt.net import tokens
from fedbpt.net.tokens import Credentials
from fedbpt.runs.store import RunStore
from tests.support.raises import raises


class Clock:
    now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(tmp_path: Path, clock: Clock) -> Iterator[DeviceRegistry]:
    with DeviceRegistry(tmp_path / "new" / "devices.db", clock) as registry:
        yield registry


def enrolled(registry: DeviceRegistry, device: str) -> Credentials:
    made = Credentials("", device, tokens.new_token())
    assert registry.enrol(registry.invite(device), tokens.digest(made.secret)) == device
    return made


def test_an_enrolled_device_is_known_by_its_token(registry: DeviceRegistry) -> None:
    a, b = enrolled(registry, "a"), enrolled(registry, "b")
    assert [registry.authenticate(device.bearer) for device in (a, b)] == ["a", "b"]
    assert [(line.device, line.state) for line in registry.devices()] == [("a", "enrolled"), ("b", "enrolled")]


def test_an_enrolled_device_is_known_after_reopening(registry: DeviceRegistry) -> None:
    made = enrolled(registry, "a")
    with DeviceRegistry(registry.path) as again:
        assert again.authenticate(made.bearer) == "a"


@pytest.mark.parametrize("bearer", ["", "~", "a", "a~", "a~wrong", "b~{}", "~{}", "{}", "a~{}x", "A~{}"])
def test_every_other_token_is_refused_in_the_same_way(registry: DeviceRegistry, bearer: str) -> None:
    made = enrolled(registry, "a")
    enrolled(registry, "b")
    with raises(CoordinatorRefusedError, code="unauthorized"):
        registry.authenticate(bearer.format(made.secret))


def test_a_code_can_be_used_once(registry: DeviceRegistry) -> None:
    code = registry.invite("a")
    registry.enrol(code, tokens.digest("first"))
    with raises(CoordinatorRefusedError, code="bad-code"):
        registry.enrol(code, tokens.digest("second"))
    assert registry.authenticate("a~first") == "a"


def test_the_same_enrolment_may_be_sent_again(registry: DeviceRegistry) -> None:
    code = registry.invite("a")
    assert [registry.enrol(code, tokens.digest("first")) for _ in range(2)] == ["a", "a"]


def test_a_used_code_does_not_undo_a_revocation(registry: DeviceRegistry) -> None:
    code = registry.invite("a")
    registry.enrol(code, tokens.digest("first"))
    registry.revoke("a")
    with pytest.raises(CoordinatorRefusedError):
        registry.enrol(code, tokens.digest("first"))
    with pytest.raises(CoordinatorRefusedError):
        registry.authenticate("a~first")


def test_a_code_expires(registry: DeviceRegistry, clock: Clock) -> None:
    code = registry.invite("a")
    assert [line.state for line in registry.devices()] == ["invited"]
    clock.now += INVITATION_S
    with raises(CoordinatorRefusedError, code="bad-code"):
        registry.enrol(code, tokens.digest("first"))
    assert registry.devices() == []


def test_a_new_code_voids_the_older_one_and_using_it_the_older_token(registry: DeviceRegistry) -> None:
    before = enrolled(registry, "a")
    old, new = registry.invite("a"), registry.invite("a")
    with pytest.raises(CoordinatorRefusedError):
        registry.enrol(old, tokens.digest("x"))
    assert registry.authenticate(before.bearer) == "a"  # until the code is used
    registry.enrol(new.lower().replace("-", " "), tokens.digest("y"))
    assert registry.authenticate("a~y") == "a"
    with pytest.raises(CoordinatorRefusedError):
        registry.authenticate(before.bearer)


def test_a_revoked_device_is_refused_and_may_be_invited_again(registry: DeviceRegistry) -> None:
    made = enrolled(registry, "a")
    registry.revoke("a")
    registry.revoke("a")
    with pytest.raises(CoordinatorRefusedError):
        registry.authenticate(made.bearer)
    assert [line.state for line in registry.devices()] == ["revoked"]
    registry.invite("a")
    assert [line.state for line in registry.devices()] == ["invited"]
    registry.revoke("a")
    assert [line.state for line in registry.devices()] == ["revoked"]
    again = enrolled(registry, "a")
    assert registry.authenticate(again.bearer) == "a"


def test_an_open_invitation_can_be_revoked(registry: DeviceRegistry) -> None:
    code = registry.invite("a")
    registry.revoke("a")
    with pytest.raises(CoordinatorRefusedError):
        registry.enrol(code, tokens.digest("x"))


def test_no_secret_is_in_the_file(registry: DeviceRegistry) -> None:
    open_code, used = registry.invite("b"), registry.invite("a")
    secret = tokens.new_token()
    registry.enrol(used, tokens.digest(secret))
    registry.authenticate(f"a~{secret}")
    content = b"".join(path.read_bytes() for path in registry.path.parent.iterdir())
    assert tokens.digest(secret) in content  # the content was read from the right files
    for code in (open_code, used):
        assert code.encode() not in content
        assert tokens.plain_code(code).encode() not in content
    assert secret.encode() not in content


@pytest.mark.parametrize("name", ["", "a b", "../a", "-a", "a~b", "x" * 129])
def test_an_invalid_name_is_refused(registry: DeviceRegistry, name: str) -> None:
    with raises(ConfigError, field="device"):
        registry.invite(name)


def test_an_unknown_device_cannot_be_revoked(registry: DeviceRegistry) -> None:
    with raises(ConfigError, field="device"):
        registry.revoke("x")


def test_a_file_that_is_not_a_registry_is_refused(tmp_path: Path) -> None:
    RunStore(tmp_path / "runs.db").close()
    (tmp_path / "text").write_text("hello " * 1000)
    for name in ("runs.db", "text"):
        with raises(StoreError) as caught:
            DeviceRegistry(tmp_path / name)
        assert name in str(caught.value)
    (tmp_path / "file").touch()
    with raises(StoreError):
        DeviceRegistry(tmp_path / "file" / "devices.db")
