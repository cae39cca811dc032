"""The devices of a run: those called, those that call in, and those known from before."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from fedbpt.cli import reach as reach_module
from fedbpt.cli.reach import Reach
from fedbpt.coordinator.clients import HttpClient
from fedbpt.coordinator.devices.enrolment import DeviceRegistry
from fedbpt.device.agent import AgentService
from fedbpt.device.agent.poller import Poller
from fedbpt.device.agent.server import AgentServer
from fedbpt.errors import ConfigError
from fedbpt.net import tokens
from fedbpt.net.tokens import Credentials
from tests.support.fake_device import FakeDevice
from tests.support.raises import raises

pytestmark = pytest.mark.slow


@pytest.fixture
def reach(tmp_path: Path) -> Reach:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    return Reach([], listen=listen, registry=tmp_path / "devices.db")


@pytest.fixture
def call(reach: Reach) -> Iterator[Callable[[str], None]]:
    """Start a device that calls in."""
    with ExitStack() as stack:

        def begin(name: str) -> None:
            credentials = Credentials(f"http://{reach.listen}", name, enrol(reach, name))
            service = AgentService(FakeDevice(name))
            stack.enter_context(Poller(service, credentials, tell=lambda _: None, pauses_s=(0.02, 0.2)))

        yield begin


def enrol(reach: Reach, name: str) -> str:
    secret = tokens.new_token()
    with DeviceRegistry(reach.registry) as registry:
        registry.enrol(registry.invite(name), tokens.digest(secret))
    return secret


def names(reach: Reach, known: list[str], finished: bool = False) -> list[str]:
    with reach.clients(dict.fromkeys(known, ""), finished, lambda _line: None) as clients:
        return [client.name for client in clients]


def changed(reach: Reach, **changes: object) -> Reach:
    return Reach(**{**vars(reach), **changes})  # type: ignore[arg-type]


def test_it_waits_for_all_enrolled_and_invited_devices(reach: Reach, call: Callable[[str], None]) -> None:
    for name in "cab":
        call(name)
    told: list[str] = []
    with reach.clients({}, False, told.append) as clients:
        assert [client.name for client in clients] == ["a", "b", "c"]
    assert told[-1].startswith("3 of 3 ")
    assert told[-1].endswith(f"http://{reach.listen}: a, b, c")


def test_known_devices_belong_to_the_run_while_they_are_enrolled(reach: Reach, call: Callable[[str], None]) -> None:
    call("c")
    enrol(reach, "absent")
    enrol(reach, "revoked")
    with DeviceRegistry(reach.registry) as registry:
        registry.revoke("revoked")
    some = changed(reach, expect=1, addresses=["http://pi5:8401"])
    assert names(some, ["c", "absent", "revoked", "pi5-8401"]) == ["pi5-8401", "absent", "c"]


def test_a_resumed_run_continues_with_its_quorum(
    reach: Reach, call: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach_module, "RETURN_S", 0.5)
    call("a")
    enrol(reach, "gone")
    told: list[str] = []
    with reach.clients({"a": "", "gone": ""}, False, told.append, quorum=0.5) as clients:
        assert [client.name for client in clients] == ["a", "gone"]
    assert told[-1].startswith("1 of 2 ")


def test_for_a_finished_run_it_does_not_wait(reach: Reach) -> None:
    assert names(changed(reach, addresses=["http://pi5:8401"]), ["b", "a", "pi5-8401"], finished=True) == [
        "pi5-8401",
        "a",
        "b",
    ]


def called_by_name(reach: Reach, known: dict[str, str] | None = None) -> dict[str, str]:
    """Addresses of the called devices, by name."""
    with reach.clients(known or {}, False, lambda _line: None) as clients:
        return {client.name: client.url for client in clients if isinstance(client, HttpClient)}


@contextmanager
def serving(*own: str) -> Iterator[list[str]]:
    """Serve devices of these names; yields their addresses."""
    with ExitStack() as stack:
        yield [stack.enter_context(AgentServer(AgentService(FakeDevice(name)))).url for name in own]


def test_a_called_device_has_the_name_that_it_reports() -> None:
    with serving("pi5", "pixel") as urls:
        assert called_by_name(Reach(urls)) == dict(zip(("pi5", "pixel"), urls, strict=True))


def test_duplicate_names_and_silent_devices_are_named_after_their_addresses() -> None:
    with serving("board", "board", "pixel") as urls:
        found = called_by_name(Reach([*urls, "http://127.0.0.1:9"]))
    ports = [url.rpartition(":")[2] for url in urls]
    assert list(found) == [f"127.0.0.1-{ports[0]}", f"127.0.0.1-{ports[1]}", "pixel", "127.0.0.1-9"]
    with serving("pixel") as urls:
        assert list(called_by_name(Reach(urls), {"pixel": ""})) != ["pixel"]  # that is one that calls in


def test_a_device_keeps_its_name_in_the_run() -> None:
    with serving("new-name", "moved", "old") as urls:
        by_address = f"127.0.0.1-{urls[2].rpartition(':')[2]}"
        known = {"pi5": urls[0], "moved": "http://10.0.0.9:8401", by_address: "", "away": "http://127.0.0.1:9"}
        found = called_by_name(Reach([*urls, "http://127.0.0.1:9"]), known)
        assert list(found) == ["pi5", "moved", by_address, "away"]


def test_without_an_enrolled_device_it_does_not_wait(reach: Reach) -> None:
    with pytest.raises(ConfigError, match="fedbpt devices invite"):
        names(reach, [])


def test_tokens_are_sent_only_to_their_addresses(tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    tokens.write_private(file, b'"http://127.0.0.1:8401/" = "right"\n')
    two = Reach(["http://127.0.0.1:8401", "http://127.0.0.1:8402/"], tokens=file)
    with two.clients({}, False, lambda _line: None) as clients:
        assert [client._transport._token for client in clients] == ["right", None]  # type: ignore[attr-defined]


@pytest.mark.parametrize("content", [b"x", b'["a"]\nb = 1', b"a = 1", b"\xff"])
def test_an_invalid_file_of_tokens_is_rejected(tmp_path: Path, content: bytes) -> None:
    tokens.write_private(tmp_path / "t", content)
    with raises(ConfigError, field="--tokens"):
        names(Reach(["http://pi5:8401"], tokens=tmp_path / "t"), [])
