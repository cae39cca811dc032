"""The choice of a proxy for an address, and requests through real proxies on loopback."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import httpx
import pytest

from fedbpt.coordinator.clients import HttpClient
from fedbpt.device.agent import AgentService
from fedbpt.device.agent.calls import client_options, enrol
from fedbpt.device.agent.server import AgentServer
from fedbpt.errors import ConfigError, CoordinatorRefusedError
from fedbpt.models import hub
from fedbpt.net import proxies
from fedbpt.net.proxies import proxy_of
from fedbpt.net.tls import Tls
from tests.support.fake_device import FakeDevice
from tests.support.hub_stand_in import COMMIT
from tests.support.raises import raises

VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUEST_METHOD")
CONTENT = b"weights of a model"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def way(url: str) -> str | None:
    proxy = proxy_of(url)
    return None if proxy is None else str(proxy.url)


@pytest.mark.parametrize(
    ("no_proxy", "direct", "proxied"),
    [
        ("10.0.0.0/8,fd00::/8", ["http://10.1.2.3", "https://[fd00::7]:8400"], ["http://11.1.2.3", "http://[fe80::1]"]),
        ("[fd00::1]", ["http://[fd00::1]", "https://[fd00:0::1]:8400"], ["http://[fd00::2]"]),
        ("[fd00::1]:8400", ["http://[fd00::1]:8400"], ["http://[fd00::1]:8401", "http://[fd00::1]"]),
        ("[fd00::]/8", ["http://[fd12::1]"], ["http://[fe80::1]"]),
        ("fd00::1", ["http://[fd00::1]"], ["http://[fd00::1:1]"]),
        ("192.168.1.7", ["http://192.168.1.7:1"], ["http://192.168.1.70"]),
        ("192.168.1.7/24", ["http://192.168.1.70"], ["http://192.168.2.7"]),
        ("192.168.1.7:8400", ["http://192.168.1.7:8400"], ["http://192.168.1.7"]),
        ("example.com", ["http://example.com", "http://a.Example.com"], ["http://badexample.com"]),
        (".example.com *.lan", ["http://example.com", "http://a.example.com", "http://pi.lan"], ["http://lan.org"]),
        ("example.com:443", ["https://example.com"], ["http://example.com", "https://example.com:8400"]),
        ("https://example.com/", ["https://example.com"], ["http://example.com"]),
        ("*", ["http://anything.at.all", "https://[fd00::1]"], []),
        (" , ,/8,[,:::,[::1,10.0.0.0/99,example.com:99999999,ä,%,a b", ["http://a", "http://b"], ["http://10.0.0.1"]),
        ("", [], ["http://10.0.0.1", "https://[fd00::1]"]),
    ],
)
def test_no_proxy_is_read_as_people_write_it(
    monkeypatch: pytest.MonkeyPatch, no_proxy: str, direct: list[str], proxied: list[str]
) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", no_proxy)
    assert [way(url) for url in direct] == [None] * len(direct)
    assert [way(url) for url in proxied] == ["http://proxy:3128"] * len(proxied)
    for url in (*direct, *proxied):
        httpx.Client(**client_options(url, Tls())).close()


def test_a_proxy_is_chosen_by_scheme_and_loopback_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert way("https://example.com") is None
    monkeypatch.setenv("all_proxy", "fallback:1")
    monkeypatch.setenv("HTTPS_PROXY", "HTTPS://one:2")
    assert way("http://example.com") == "http://fallback:1"
    assert way("https://example.com") == "https://one:2"
    assert [way(f"http://{host}:8400") for host in ("localhost", "127.0.0.1", "127.1.2.3", "[::1]")] == [None] * 4


@pytest.mark.parametrize(
    "value", ["http://[::1", "http://", "socks4://proxy:1", "ftp://proxy", "http://proxy:port", ":"]
)
def test_an_invalid_proxy_is_refused_by_its_variable_and_not_quoted(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    secret = value.replace("://", "://me:secret@")
    monkeypatch.setenv("HTTPS_PROXY", secret)
    with raises(ConfigError, field="HTTPS_PROXY") as caught:
        client_options("https://example.com", Tls())
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("kind", ["socks5", "socks5h", "socks"])
def test_a_socks_proxy_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("ALL_PROXY", f"{kind}://proxy:1080")
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(proxies.importlib.util, "find_spec", lambda _name: None)
    for call in (lambda: enrol("https://example.com", "code"), lambda: hub.describe("owner/repo", "m.gguf")):
        with raises(ConfigError, field="ALL_PROXY") as caught:
            call()
        assert "pip install 'httpx[socks]'" in str(caught.value)


# --- real proxies ------------------------------------------------------------------------------------------------


class Proxy(ThreadingHTTPServer):
    """Responds for any host that does not exist: as a coordinator that refuses, and as a hub with one file."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.asked: list[str] = []


class _Answer(BaseHTTPRequestHandler):
    server: Proxy

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        self.rfile.read(int(self.headers.get("content-length", 0)))
        body = b"" if self.command in ("POST", "HEAD") else CONTENT
        self.send_response(404 if self.command == "POST" else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Etag", f'"{hashlib.sha256(CONTENT).hexdigest()}"')
        self.send_header("X-Linked-Size", str(len(CONTENT)))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@contextmanager
def socks(target: int) -> Iterator[tuple[int, list[bytes]]]:
    """A SOCKS5 proxy that directs every connection to a loopback port, and records the requested addresses."""
    asked: list[bytes] = []
    opened: list[socket.socket] = []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        while content := source.recv(4096):
            sink.sendall(content)
        sink.shutdown(socket.SHUT_WR)

    def serve(client: socket.socket) -> None:
        client.recv(262)  # how it may prove itself: it need not
        client.sendall(b"\x05\x00")
        asked.append(client.recv(262))
        client.sendall(b"\x05\x00\x00\x01\x7f\x00\x00\x01\x00\x00")
        other = socket.create_connection(("127.0.0.1", target))
        opened.append(other)
        back = threading.Thread(target=pump, args=(other, client))
        back.start()
        pump(client, other)
        back.join()

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            client, _ = listener.accept()
            opened.append(client)
            serve(client)

        thread = threading.Thread(target=accept)
        thread.start()
        yield listener.getsockname()[1], asked
        thread.join()
    for each in opened:
        each.close()


def test_enrolment_goes_through_the_proxy(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{proxy.server_port}")
    monkeypatch.setenv("NO_PROXY", "10.0.0.0/8,[::1],fd00::/8")
    with raises(CoordinatorRefusedError, code="not-a-coordinator"):
        enrol("http://coordinator.invalid:8400", "code", allow_insecure=True)
    assert [asked.split()[1].rsplit("/", 2)[0] for asked in proxy.asked] == ["http://coordinator.invalid:8400"]


@pytest.mark.parametrize("named", ["socks5://127.0.0.1:1", "socks4://127.0.0.1:1", "http://127.0.0.1:1"])
def test_a_coordinator_calls_devices_without_proxies(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    for name in ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, named)
    monkeypatch.setenv("NO_PROXY", "10.0.0.0/8,[::1],fd00::/8")

    async def status(url: str) -> str:
        client = HttpClient(url)
        try:
            return (await client.status()).name
        finally:
            await client.aclose()

    with AgentServer(AgentService(FakeDevice("a"))) as server:
        assert asyncio.run(status(server.url)) == "a"
        name = f"http://localhost:{server.port}"
        assert asyncio.run(status(name)) == "a"


def test_the_hub_is_reached_through_the_proxy(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.server_port}")
    monkeypatch.setenv("NO_PROXY", "10.0.0.0/8,[::1],fd00::/8")
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    remote = hub.describe("owner/repo", "m.gguf")
    assert hub.fetch(remote, tmp_path_factory.mktemp("hub")).read_bytes() == CONTENT
    assert [(asked.split()[0], urlsplit(asked.split()[1]).hostname) for asked in proxy.asked] == [
        ("HEAD", "hub.invalid"),
        ("GET", "hub.invalid"),
    ]


def test_a_call_goes_through_a_socks_proxy_which_looks_the_name_up(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("socksio", reason="of httpx[socks], which an install of fedbpt brings")
    with socks(proxy.server_port) as (port, asked):
        monkeypatch.setenv("ALL_PROXY", f"socks5h://127.0.0.1:{port}")
        with raises(CoordinatorRefusedError, code="not-a-coordinator"):
            enrol("http://coordinator.invalid:8400", "code", allow_insecure=True)
    assert len(proxy.asked) == 1
    assert b"coordinator.invalid" in asked[0]
