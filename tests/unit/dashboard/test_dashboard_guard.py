"""`Guard`: who may open and control the dashboard."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from fedbpt.dashboard.guard import COOKIE, Guard, may_control
from fedbpt.dashboard.server import DashboardServer
from fedbpt.dashboard.visits import Visits
from fedbpt.errors import ConfigError, MissingExtraError
from fedbpt.net.tokens import watch_token


async def _page(_request: Request) -> Response:
    return PlainTextResponse("page")


async def _socket(socket: WebSocket) -> None:
    await socket.accept()
    await socket.send_text("hello")
    await socket.close()


def client(token: str | None = None, base_url: str = "http://127.0.0.1:8500") -> TestClient:
    app = Starlette(routes=[Route("/", _page), WebSocketRoute("/ws", _socket)])
    return TestClient(Guard(app, token), base_url=base_url, follow_redirects=False)


def hears(http: TestClient, **headers: str) -> bool:
    try:
        with http.websocket_connect(str(http.base_url.join("/ws")).replace("http", "ws"), headers=headers) as socket:
            return socket.receive_text() == "hello"
    except WebSocketDisconnect:
        return False


def test_without_a_token_only_requests_to_loopback_names_are_served() -> None:
    http = client()
    assert (http.get("/").text, hears(http)) == ("page", True)
    assert http.get("/", headers={"host": "localhost:8500"}).status_code == 200
    assert http.get("/", headers={"host": "evil.example"}).status_code == 421
    assert not hears(http, host="evil.example")


def test_requests_of_other_web_pages_are_rejected() -> None:
    http = client()
    assert http.get("/", headers={"origin": "https://evil.example"}).status_code == 401
    for origin in ("https://evil.example", "http://127.0.0.1:9999", "null", "["):
        assert not hears(http, origin=origin)
    assert hears(http, origin="http://127.0.0.1:8500", host="127.0.0.1:8500")


def test_with_a_token_the_link_gives_a_cookie_that_opens_pages_and_sockets() -> None:
    http = client("secret-token", "https://coordinator.lan:8500")
    assert http.get("/").status_code == 401
    assert "open the link" in http.get("/").text
    assert not hears(http)
    answer = http.get("/?token=secret-token")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert all(flag in cookie for flag in (COOKIE, "HttpOnly", "Secure", "SameSite=strict"))
    assert (http.get("/").text, hears(http)) == ("page", True)


def test_a_program_may_send_the_token_as_a_header() -> None:
    assert client("secret-token").get("/", headers={"authorization": "Bearer secret-token"}).status_code == 200


async def _steers(request: Request) -> Response:
    return PlainTextResponse(str(may_control(request.scope)))


def steering(token: str | None) -> TestClient:
    base_url = "http://127.0.0.1:8500" if token is None else "http://192.168.1.20:8500"
    return TestClient(Guard(Starlette(routes=[Route("/", _steers)]), token), base_url=base_url)


def test_only_the_operators_link_gives_control() -> None:
    assert steering(None).get("/").text == "True"
    watcher = steering("secret-token")
    assert watcher.get(f"/?token={watch_token('secret-token')}").text == "False"
    assert watcher.get("/").text == "False"
    operator = steering("secret-token")
    assert operator.get("/?token=secret-token").text == "True"
    assert watcher.get("/?token=secret-token").text == "True"  # who opens the operator's link later is the operator
    bearer = {"authorization": f"Bearer {watch_token('secret-token')}"}
    assert steering("secret-token").get("/", headers=bearer).text == "False"
    assert not may_control({})  # of a request that came by another way


def test_the_watch_token_is_derived_from_the_operators() -> None:
    first, again, other = watch_token("secret-token"), watch_token("secret-token"), watch_token("another-token")
    assert first == again != other
    assert "secret" not in first
    assert len(first) == 22  # 128 bits


def test_without_a_token_there_is_no_watch_token() -> None:
    assert steering(None).get("/?token=").text == "True"
    assert client("secret-token").get("/?token=").status_code == 401


def test_guessing_tokens_is_rate_limited() -> None:
    http = client("secret-token")
    codes = [http.get(f"/?token={i}").status_code for i in range(12)]
    assert (codes[0], codes[-1]) == (401, 429)


def test_without_nicegui_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nicegui", None)
    for name in ("app", "pages", "compare_page", "elements", "controls", "beside"):
        monkeypatch.delitem(sys.modules, f"fedbpt.dashboard.{name}", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'fedbpt\[dashboard\]'"):
        DashboardServer(tmp_path / "runs.db", "r")


def test_beyond_loopback_it_requires_a_token_and_encryption(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--dashboard-token"):
        DashboardServer(tmp_path / "runs.db", "r", "0.0.0.0", allow_insecure=True)


def test_a_request_that_passes_is_a_visit() -> None:
    visits: list[None] = []
    app = Starlette(routes=[Route("/", _page), WebSocketRoute("/ws", _socket)])
    http = TestClient(Guard(app, None, lambda: visits.append(None)), base_url="http://elsewhere:8500")
    assert (http.get("/").status_code, len(visits)) == (421, 0)
    assert (http.get("/", headers={"host": "localhost:8500"}).status_code, len(visits)) == (200, 1)


def test_a_page_counts_as_open_for_some_seconds_more(monkeypatch: pytest.MonkeyPatch) -> None:
    open_pages = iter((0, 1, 0, 0))
    visits = Visits(lambda: next(open_pages))
    assert not visits.are_recent()
    assert visits.are_recent()
    assert visits.are_recent()  # between two pages, perhaps
    monkeypatch.setattr("fedbpt.dashboard.visits.AWAY_S", 0.0)
    assert not visits.are_recent()
