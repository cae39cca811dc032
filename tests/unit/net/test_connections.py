"""Silent connections, and requests with a foreign host name, with real sockets on loopback."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from fedbpt.coordinator.devices.enrolment import DeviceRegistry
from fedbpt.coordinator.monitoring.monitor import MonitorServer
from fedbpt.coordinator.service.server import CoordinatorServer
from fedbpt.dashboard.server import DashboardServer
from fedbpt.device.agent import AgentService
from fedbpt.device.agent.server import AgentServer
from fedbpt.net import connections
from fedbpt.net import server as http_server
from fedbpt.net.auth import is_local_name
from fedbpt.net.certs import init, issue
from fedbpt.net.server import HttpServer
from fedbpt.net.tls import Tls
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import ErrorReply
from fedbpt.serving.server import ModelServer
from tests.support.caller import wait_until
from tests.support.fake_device import FakeDevice

pytestmark = pytest.mark.slow

MOST = 12
GET = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def app(release: threading.Event) -> Starlette:
    """An application that responds at once, or on ``/held`` after a release."""

    async def at_once(_request: Request) -> Response:
        return PlainTextResponse("ok")

    def held(_request: Request) -> Response:
        release.wait(60)
        return PlainTextResponse("held")

    return Starlette(routes=[Route("/", at_once), Route("/held", held)])


@contextmanager
def served(most: int | None = MOST, **options: Any) -> Iterator[tuple[HttpServer, threading.Event]]:
    release = threading.Event()
    try:
        with HttpServer(app(release), "127.0.0.1", 0, most_connections=most, **options) as server:
            yield server, release
    finally:
        release.set()


def connect(server: HttpServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def ended(connection: socket.socket) -> bool:
    """Whether the server has closed the connection."""
    connection.settimeout(0.01)
    try:
        return connection.recv(4096) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def answers(server: HttpServer) -> bool:
    return httpx.get(f"http://127.0.0.1:{server.port}/", timeout=20, trust_env=False).text == "ok"


def test_idle_connections_are_closed_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with served() as (server, _), ExitStack() as stack:
        idle = [stack.enter_context(closing(connect(server))) for _ in range(5 * MOST)]
        assert answers(server)
        wait_until(lambda: sum(not ended(each) for each in idle) <= MOST)
        assert answers(server)
    assert [record.name for record in caplog.records] == ["fedbpt.net.connections"]


def test_who_waits_for_an_answer_keeps_its_connection() -> None:
    with served() as (server, release), ExitStack() as stack:
        waiting = [stack.enter_context(closing(connect(server))) for _ in range(3)]
        for each in waiting:
            each.sendall(GET.replace(b"/ ", b"/held "))
        wait_until(lambda: sum(each.idle_since is None for each in server._socket._open.values()) == 3)
        for _ in range(3 * MOST):
            stack.enter_context(closing(connect(server)))
        assert answers(server)
        release.set()
        for each in waiting:
            each.settimeout(20)
            assert each.recv(4096).startswith(b"HTTP/1.1 200")


def test_with_all_at_work_new_ones_are_turned_away() -> None:
    with served(most=3) as (server, release), ExitStack() as stack:
        waiting = [stack.enter_context(closing(connect(server))) for _ in range(3)]
        for each in waiting:
            each.sendall(GET.replace(b"/ ", b"/held "))
        wait_until(lambda: sum(each.idle_since is None for each in server._socket._open.values()) == 3)
        late = stack.enter_context(closing(connect(server)))
        wait_until(lambda: ended(late))
        release.set()
        for each in waiting:
            each.settimeout(20)
            assert each.recv(4096).startswith(b"HTTP/1.1 200")
        wait_until(lambda: answers(server))


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\nHost: 127", GET + b"GET /"], ids=["nothing", "half", "next"])
def test_who_does_not_finish_a_request_is_closed_in_time(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_TIMEOUT_S", 0.3)
    monkeypatch.setattr(connections, "KEEP_ALIVE_S", 0.3)
    with served() as (server, _), closing(connect(server)) as slow:
        slow.sendall(said)
        wait_until(lambda: ended(slow))
        assert answers(server)


def test_a_long_answer_is_not_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_TIMEOUT_S", 0.2)
    monkeypatch.setattr(connections, "KEEP_ALIVE_S", 0.2)
    with served() as (server, release), closing(connect(server)) as waiting:
        waiting.sendall(GET.replace(b"/ ", b"/held "))
        with closing(connect(server)) as idle:
            wait_until(lambda: ended(idle))
        assert not ended(waiting)
        release.set()
        waiting.settimeout(20)
        assert waiting.recv(4096).startswith(b"HTTP/1.1 200")


def test_a_tls_handshake_that_does_not_come_is_closed_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_TIMEOUT_S", 0.5)
    init(tmp_path)
    cert, key = issue(tmp_path, "here", ["127.0.0.1"])
    ca = tmp_path / "ca.pem"
    with served(tls=Tls(cert, key)) as (server, _), closing(connect(server)) as silent:
        wait_until(lambda: ended(silent))
        context = Tls(ca=ca).client_context()
        assert httpx.get(f"https://127.0.0.1:{server.port}/", verify=context, trust_env=False, timeout=20).text == "ok"


STARVED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from fedbpt.net.server import HttpServer
app = Starlette(routes=[Route("/", lambda _: PlainTextResponse("ok"))])
most = int(sys.argv[1]) or None
HttpServer(app, "127.0.0.1", 0, most_connections=most, on_ready=lambda url: print(url, flush=True)).run()
"""


@pytest.mark.parametrize("most", [0, 1000], ids=["by its limit", "believing it had more"])
def test_a_process_without_file_descriptors_keeps_serving_and_warns_once(most: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STARVED, str(most)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        url = httpx.URL(process.stdout.readline().strip())
        with ExitStack() as stack:
            for _ in range(200):
                stack.enter_context(closing(socket.create_connection((url.host, url.port or 0), timeout=20)))

            def answers() -> bool:
                try:
                    return httpx.get(url, timeout=5, trust_env=False).text == "ok"
                except httpx.TransportError:
                    return False  # turned away for now

            wait_until(answers)
        wait_until(answers)
    finally:
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert len(said.splitlines()) <= 2, said
    assert "Traceback" not in said


def test_invalid_requests_are_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server._LIMIT_WARNINGS, "_last", {})
    with served() as (server, _):
        for _ in range(20):
            with closing(connect(server)) as stranger:
                stranger.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
                wait_until(lambda connection=stranger: ended(connection))  # type: ignore[misc]
        assert answers(server)
    assert [record.levelname for record in caplog.records if record.name.startswith("uvicorn")] == ["WARNING"]


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "local"),
    [
        *((name, True) for name in ("192.168.1.7", "::1", "localhost", "pi5", "pi5.local", "pi5.lan", "a.home.arpa")),
        *((name, False) for name in ("", "evil.example", "pi5.evil.example", "127.0.0.1.evil.example", "local.com")),
    ],
)
def test_names_that_nobody_can_register_are_local(name: str, local: bool) -> None:
    assert is_local_name(name) is local


def of_device(_: Path) -> HttpServer:
    return AgentServer(AgentService(FakeDevice("a")))


def of_device_on_a_network(_: Path) -> HttpServer:
    return AgentServer(AgentService(FakeDevice("a")), "0.0.0.0", allow_insecure=True)


def of_coordinator(folder: Path) -> HttpServer:
    return CoordinatorServer(DeviceRegistry(folder / "devices.db"))


def of_monitor(folder: Path) -> HttpServer:
    return MonitorServer(folder / "runs.db", "r")


def of_dashboard(folder: Path) -> HttpServer:
    return DashboardServer(folder / "runs.db", "r")


def of_models(_: Path) -> HttpServer:
    return ModelServer({})


PATHS: dict[Callable[[Path], HttpServer], tuple[str, ...]] = {
    of_device: ("/v1/status", "/healthz", "/metrics", "/v1/rounds/r/1"),
    of_device_on_a_network: ("/v1/status",),
    of_coordinator: ("/healthz", "/v1/mailbox/poll", "/v1/enrol"),
    of_monitor: ("/v1/runs", "/metrics", "/healthz"),
    of_dashboard: ("/",),
    of_models: ("/v1/models", "/healthz"),
}


@pytest.mark.parametrize("make", PATHS, ids=lambda make: make.__name__.removeprefix("of_"))
def test_without_a_token_no_server_answers_under_a_strangers_name(
    make: Callable[[Path], HttpServer], tmp_path: Path
) -> None:
    with make(tmp_path) as server, httpx.Client(trust_env=False, timeout=20) as http:
        for path in PATHS[make]:
            url = f"http://127.0.0.1:{server.port}{path}"
            method = "POST" if path in ("/v1/mailbox/poll", "/v1/enrol") else "GET"
            for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1.evil.example"):
                headers = {"host": host, "content-type": codec.CONTENT_TYPE}
                assert http.request(method, url, headers=headers).status_code == 421, (path, host)
            for host in (f"127.0.0.1:{server.port}", "localhost"):
                headers = {"host": host, "content-type": codec.CONTENT_TYPE}
                assert http.request(method, url, headers=headers).status_code != 421, (path, host)


def test_a_device_on_a_network_is_called_by_its_names_there() -> None:
    with (
        AgentServer(AgentService(FakeDevice("a")), "0.0.0.0", allow_insecure=True) as server,
        httpx.Client(trust_env=False, timeout=20) as http,
    ):
        url = f"http://127.0.0.1:{server.port}/v1/status"
        for host in ("pi5:8401", "pi5.local", "10.0.0.7:8401", "[fd00::7]:8401"):
            assert http.get(url, headers={"host": host}).status_code == 200, host
        refused = http.get(url, headers={"host": "pi5.example.org", "accept": codec.CONTENT_TYPE})
        assert codec.decode(refused.content, ErrorReply).code == "wrong-host"


def test_with_a_token_a_device_answers_under_any_name() -> None:
    with AgentServer(AgentService(FakeDevice("a")), token="t" * 43) as server:
        headers = {"host": "pi5.example.org", "authorization": f"Bearer {'t' * 43}"}
        url = f"http://127.0.0.1:{server.port}/v1/status"
        assert httpx.get(url, headers=headers, trust_env=False, timeout=20).status_code == 200
