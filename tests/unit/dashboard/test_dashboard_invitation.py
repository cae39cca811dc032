"""Links and QR codes of the dashboard."""

from __future__ import annotations

import socket
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from fedbpt.cli.observe import print_watch_link
from fedbpt.dashboard import invitation
from fedbpt.dashboard.invitation import is_every_address, links, own_address, qr_lines, qr_svg, reachable_host
from fedbpt.net.tokens import watch_token

LINK = "http://192.168.1.20:8500/?token=AbCdEf0123456789_-xyzw"


class Probe:
    """A socket that is connected and sends nothing."""

    def __init__(self, kind: int, address: str) -> None:
        assert kind == socket.SOCK_DGRAM
        self._address = address

    def connect(self, _to: object) -> None:
        if not self._address:
            raise OSError("the network is unreachable")

    def getsockname(self) -> tuple[str, int]:
        return self._address, 1

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        pytest.fail(f"a packet may not be sent: {name}")


@pytest.mark.parametrize(("address", "own"), [("192.168.1.20", "192.168.1.20"), ("127.0.0.1", ""), ("", "")])
def test_the_address_is_that_of_the_default_route(monkeypatch: pytest.MonkeyPatch, address: str, own: str) -> None:
    monkeypatch.setattr(invitation.socket, "socket", lambda _family, kind: Probe(kind, address))
    monkeypatch.setattr(invitation.socket, "gethostname", lambda: "pi5")
    assert own_address() == own
    assert reachable_host("0.0.0.0") == reachable_host("::") == (own or "pi5")
    assert reachable_host("10.0.0.7") == "10.0.0.7"
    assert reachable_host("pi5.lan") == "pi5.lan"


def test_which_hosts_are_all_addresses() -> None:
    assert [is_every_address(host) for host in ("0.0.0.0", "::", "127.0.0.1", "localhost", "pi5")] == [
        True, True, False, False, False,
    ]  # fmt: skip


def test_a_qr_code_is_square_with_a_quiet_zone_and_fits_a_terminal() -> None:
    lines = qr_lines(LINK)
    assert {len(line) for line in lines} == {len(lines[0])}
    assert len(lines[0]) in (2 * len(lines), 2 * len(lines) - 1)
    assert len(lines[0]) <= 80
    assert len(lines) <= 24
    assert set("".join(lines)) == set("█▀▄ ")
    assert set(lines[0]) == {"█"}  # light, around
    assert all(line.startswith("██") and line.endswith("██") for line in lines[:-1])


def test_the_svg_does_not_contain_the_link() -> None:
    svg = qr_svg(LINK + "<script>")
    assert svg.startswith("<svg")
    assert "script" not in svg
    assert "192.168" not in svg


@pytest.mark.parametrize("terminal", [True, False])
def test_only_a_terminal_shows_the_qr_code(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    said: list[str] = []
    print_watch_link(SimpleNamespace(watch_link=LINK), said.append)  # type: ignore[arg-type]
    assert said[0].endswith(LINK)
    assert said[1:] == (qr_lines(LINK) if terminal else [])
    print_watch_link(SimpleNamespace(watch_link=None), pytest.fail)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("host", "encrypted", "own", "everybodys"),
    [
        ("127.0.0.1", False, "http://127.0.0.1:8500/?token=secret-token", None),
        ("0.0.0.0", False, "http://127.0.0.1:8500/?token=secret-token", "http://192.168.1.20:8500"),
        ("0.0.0.0", True, "https://192.168.1.20:8500/?token=secret-token", "https://192.168.1.20:8500"),
        ("pi5.lan", False, "http://pi5.lan:8500/?token=secret-token", "http://pi5.lan:8500"),
    ],
)
def test_links_are_reachable_where_needed(
    monkeypatch: pytest.MonkeyPatch, host: str, encrypted: bool, own: str, everybodys: str | None
) -> None:
    monkeypatch.setattr(invitation, "own_address", lambda: "192.168.1.20")
    found = links(host, 8500, encrypted, "secret-token")
    assert found.operators == own
    assert found.everybodys == (everybodys and f"{everybodys}/?token={watch_token('secret-token')}")
    assert links("127.0.0.1", 8500, False, None) == ("http://127.0.0.1:8500", None)
