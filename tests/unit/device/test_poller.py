"""A device that polls a coordinator which is absent, refuses, or responds with nonsense."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from fedbpt.coordinator.devices.enrolment import DeviceRegistry
from fedbpt.coordinator.service.server import CoordinatorServer
from fedbpt.device.agent import AgentService
from fedbpt.device.agent.calls import enrol
from fedbpt.device.agent.poller import Backoff, Poller
from fedbpt.errors import ConfigError, CoordinatorRefusedError
from fedbpt.net import tokens
from fedbpt.net.tokens import Credentials
from fedbpt.protocol import codec
from fedbpt.protocol.polling import PACED_HEADER, Delivery, Poll, Reply, Request
from fedbpt.protocol.rounds import DeviceInfo, ErrorReply
from fedbpt.protocol.specs import Array, Message
from tests.contract.test_clients import plan, request
from tests.support.caller import called_by, wait_until
from tests.support.fake_device import FakeDevice
from tests.support.raises import raises

ID = "a" * 32


def answer(message: Message, status: int = 200, **headers: str) -> httpx.Response:
    return httpx.Response(
        status, headers={"content-type": codec.CONTENT_TYPE, **headers}, content=codec.encode(message)
    )


def refused(code: str, status: int, **headers: str) -> httpx.Response:
    return answer(ErrorReply(code=code, message=f"{code}, it says"), status, **headers)


class Coordinator:
    """Responds to polls in turn, then ``unauthorized`` when no request is held; to replies with 204."""

    def __init__(self, *polls: httpx.Response | Exception) -> None:
        self.polls = list(polls)
        self.asked: list[Poll] = []
        self.replies: dict[str, Reply] = {}
        self.reply_answers: list[httpx.Response] = []
        self.bearers: set[str] = set()
        self.paced: list[str] = []
        self.n_replies = 0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.bearers.add(request.headers["authorization"])
        if request.url.path == "/v1/mailbox/poll":
            self.paced.append(request.headers.get(PACED_HEADER, ""))
            self.asked.append(codec.decode(request.content, Poll))
            if not self.polls and self.asked[-1].holding:
                await asyncio.sleep(0.001)
                return answer(Delivery())
            found = self.polls.pop(0) if self.polls else refused("unauthorized", 401)
            if isinstance(found, Exception):
                raise found
            return found
        self.n_replies += 1
        self.replies[request.url.path.rsplit("/", 1)[1]] = codec.decode(request.content, Reply)
        return self.reply_answers.pop(0) if self.reply_answers else httpx.Response(204)


def run(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[float]]:
    """Run a device that polls ``coordinator`` until refused; returns its lines for people and its least waits."""
    told: list[str] = []
    waits: list[float] = []

    def pause(_self: Backoff, at_least_s: float = 0.0) -> float:
        waits.append(at_least_s)
        return 0.0

    monkeypatch.setattr(Backoff, "pause", pause)
    credentials = Credentials("http://127.0.0.1:9", "a", "secret")
    poller = Poller(AgentService(FakeDevice("a")), credentials, tell=told.append)
    poller._options["transport"] = httpx.MockTransport(coordinator)
    with pytest.raises(CoordinatorRefusedError) as caught:
        poller.run()
    assert caught.value.code == "unauthorized"
    return told, waits


def test_a_pause_grows_with_full_jitter_up_to_its_longest() -> None:
    bounds = []
    for _ in range(200):
        backoff = Backoff(0.5, 8.0, random.Random(len(bounds)))
        bounds.append([backoff.pause() for _ in range(8)])
    longest = [max(column) for column in zip(*bounds, strict=True)]
    shortest = [min(column) for column in zip(*bounds, strict=True)]
    for i, bound in enumerate([0.5, 1, 2, 4, 8, 8, 8, 8]):
        assert 0.9 * bound < longest[i] <= bound
        assert shortest[i] < 0.1 * bound


def test_a_server_is_not_called_before_the_time_it_names() -> None:
    assert min(Backoff(0.5, 8.0).pause(60.0) for _ in range(20)) >= 60.0
    assert Backoff(0.5, 8.0).pause(60.0) <= 60.5


def test_requests_are_answered_by_the_devices_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Request(id=ID, method="GET", path="/v1/status")
    unknown = Request(id="b" * 32, method="GET", path="/v1/rounds/r/1?wait=0")
    coordinator = Coordinator(answer(Delivery(requests=(wanted, unknown))))
    assert run(coordinator, monkeypatch) == ([], [])
    assert codec.decode(coordinator.replies[ID].body, DeviceInfo).name == "a"
    assert coordinator.replies["b" * 32].status == 404
    assert coordinator.bearers == {"Bearer a~secret"}
    assert coordinator.asked[-1].holding == ()


def test_a_request_delivered_twice_is_handled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Request(id=ID, method="GET", path="/v1/status")
    again = answer(Delivery(requests=(wanted, wanted)))
    coordinator = Coordinator(again, again)
    run(coordinator, monkeypatch)
    assert coordinator.asked[1].holding == (ID,)
    assert coordinator.n_replies == 1


def test_a_failure_and_its_end_are_each_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = httpx.ConnectError("refused")
    told, waits = run(Coordinator(absent, absent, answer(Delivery()), absent, answer(Delivery())), monkeypatch)
    there = "http://127.0.0.1:9"
    assert [there in line for line in told] == 4 * [True]
    assert ["refused" in line for line in told] == 2 * [True, False]
    assert waits == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("response", "value", "wait_s"),
    [
        (refused("stopping", 503, **{"retry-after": "7"}), "stopping, it says", 7.0),
        (refused("too-many", 429, **{"retry-after": "60"}), "too-many, it says", 60.0),
        (refused("superseded", 409), "superseded, it says", 0.0),
        (httpx.Response(502, headers={"retry-after": "5"}, text="<html>"), "502", 5.0),
        (httpx.Response(503, headers={"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}), "503", 0.0),
        (httpx.Response(302, headers={"location": "http://elsewhere"}), "302", 0.0),
        (httpx.Response(200, text="<html>sign in</html>"), "Delivery", 0.0),
        (answer(ErrorReply(code="x", message="y")), "Delivery", 0.0),
    ],
)
def test_a_coordinator_with_an_unusable_response_is_called_again_at_the_time_it_names(
    response: httpx.Response, value: str, wait_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, waits = run(Coordinator(response, answer(Delivery())), monkeypatch)
    assert value in told[0]
    assert "secret" not in " ".join(told)
    assert waits == [wait_s]


@pytest.mark.parametrize(("told_s", "waited_s"), [("7", [7.0]), ("86400", [600.0]), ("0", []), ("soon", [])])
def test_a_device_without_work_calls_when_it_is_told_within_bounds(
    told_s: str, waited_s: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("fedbpt.device.agent.poller.asyncio.sleep", sleep)
    coordinator = Coordinator(answer(Delivery(), **{"retry-after": told_s}), answer(Delivery()))
    assert run(coordinator, monkeypatch)[0] == []
    assert waits == waited_s
    assert set(coordinator.paced) == {"1"}


def test_a_device_that_works_does_not_offer_to_call_later() -> None:
    device = FakeDevice("a")
    device.gate.clear()
    coordinator = Coordinator(*(answer(Delivery()) for _ in range(3)))

    async def scene() -> None:
        service = AgentService(device)
        poller = Poller(service, Credentials("http://127.0.0.1:9", "a", "secret"))
        async with httpx.AsyncClient(**poller._options, transport=httpx.MockTransport(coordinator)) as http:
            await poller._poll(http)
            service.start(plan())
            await poller._poll(http)
            device.gate.set()
            await service.wait("r", 1, 60.0)
            await poller._poll(http)
        service.close()

    asyncio.run(scene())
    assert coordinator.paced == ["1", "", "1"]


def test_work_is_never_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Request(id=ID, method="GET", path="/v1/status")
    coordinator = Coordinator(answer(Delivery(requests=(wanted,)), **{"retry-after": "3600"}))
    assert run(coordinator, monkeypatch) == ([], [])
    assert coordinator.replies[ID].status == 200


@pytest.mark.parametrize(("code", "status"), [("unknown-request", 404), ("conflict", 409), ("too-large", 413)])
def test_a_refused_reply_is_dropped(code: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Request(id=ID, method="GET", path="/v1/status")
    coordinator = Coordinator(answer(Delivery(requests=(wanted,))))
    coordinator.reply_answers = [refused(code, status)]
    assert run(coordinator, monkeypatch) == ([], [])
    assert coordinator.asked[-1].holding == ()


def test_a_reply_is_sent_until_it_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Request(id=ID, method="GET", path="/v1/status")
    coordinator = Coordinator(answer(Delivery(requests=(wanted,))))
    coordinator.reply_answers = [refused("stopping", 503, **{"retry-after": "3"})]
    _, waits = run(coordinator, monkeypatch)
    assert waits == [3.0]
    assert coordinator.asked[-1].holding == ()


@pytest.mark.parametrize(
    "url", ["", "host:8400", "ftp://host", "https://", "https://user:pw@host", "https://host?token=x"]
)
def test_an_invalid_address_is_refused(url: str) -> None:
    with raises(ConfigError, field="coordinator"):
        Poller(AgentService(FakeDevice("a")), Credentials(url, "a", "secret"))


def test_a_token_is_never_sent_unencrypted() -> None:
    far = Credentials("http://coordinator.example:8400", "a", "secret")
    with raises(ConfigError, field="coordinator"):
        Poller(AgentService(FakeDevice("a")), far)
    with raises(ConfigError, field="coordinator"):
        enrol(far.coordinator, "CODE")
    Poller(AgentService(FakeDevice("a")), far, allow_insecure=True)


# --- against a real server ---------------------------------------------------------------------------------------


@contextmanager
def served(folder: Path, port: int = 0) -> Iterator[CoordinatorServer]:
    with DeviceRegistry(folder / "devices.db") as registry, CoordinatorServer(registry, port=port) as server:
        yield server


@contextmanager
def calling(credentials: Credentials, tell: Callable[[str], None] = lambda _line: None) -> Iterator[Poller]:
    with Poller(AgentService(FakeDevice("a")), credentials, tell=tell, pauses_s=(0.02, 0.1)) as poller:
        yield poller


class PatienceError(Exception):
    """Enough was waited."""


def test_a_delayed_enrolment_is_repeated_at_the_time_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            raise PatienceError

    monkeypatch.setattr("fedbpt.device.agent.calls.time.sleep", wait)
    with DeviceRegistry(tmp_path / "devices.db") as registry:
        with CoordinatorServer(registry, guess_limit=(0.001, 1)) as server:
            assert enrol(server.url, registry.invite("a")).device == "a"
            with pytest.raises(PatienceError):
                enrol(server.url, registry.invite("b"))
    assert min(waits) > 500
    assert len(waits) == 3


def test_a_wrong_code_is_refused(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        with raises(CoordinatorRefusedError, code="bad-code"):
            enrol(server.url, "WRONG")


def test_an_enrolment_waits_for_its_coordinator_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    waits: list[float] = []
    with ExitStack() as stack:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        registry = stack.enter_context(DeviceRegistry(tmp_path / "devices.db"))

        def wait(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 8:
                stack.enter_context(CoordinatorServer(registry, port=port))

        monkeypatch.setattr("fedbpt.device.agent.calls.time.sleep", wait)
        made = enrol(f"http://127.0.0.1:{port}", registry.invite("a"), tell=told.append)
    assert made.device == "a"
    assert waits == sorted(waits)
    assert waits[-1] <= 10
    assert len(told) == 1
    assert "fedbpt tune --listen" in told[0]


def test_a_device_finds_a_coordinator_that_was_restarted(tmp_path: Path) -> None:
    told: list[str] = []
    with served(tmp_path) as server:
        with DeviceRegistry(tmp_path / "devices.db") as registry:
            credentials = enrol(server.url, registry.invite("a"))

    def fails() -> bool:
        return told[-1].startswith(f"{server.url}: ")

    with calling(credentials, told.append):
        wait_until(lambda: len(told) == 1)
        for _ in range(2):
            with served(tmp_path, server.port) as again:
                wait_until(lambda: again.present() == ["a"] and not fails())
            wait_until(fails)


def test_no_secret_is_in_logs_urls_or_the_coordinators_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    told: list[str] = []
    with served(tmp_path) as server, DeviceRegistry(tmp_path / "devices.db") as registry:
        code = registry.invite("a")
        credentials = enrol(server.url, code)
        with calling(credentials, told.append):
            wait_until(lambda: server.present() == ["a"])
            assert asyncio.run(server.client("a").status()).name == "a"
        files = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    logged = caplog.text + " ".join(map(str, told))
    assert "/v1/mailbox/poll" in logged  # addresses are logged, and looked at here
    assert b"invitations" in files
    for secret in (code, tokens.plain_code(code), credentials.secret):
        assert secret not in logged
        assert secret.encode() not in files


def test_a_message_just_below_the_limit_goes_through(tmp_path: Path) -> None:
    device = FakeDevice("a")
    with called_by(tmp_path, device) as coordinator:
        client = coordinator.client("a")
        latents = Array.of(np.zeros((2000, 1000)))
        report = asyncio.run(client.evaluate(request(latents=latents)))
    assert len(report.correct) == 2000
    assert 15 * 2**20 < client.bytes_down < codec.MAX_BODY_BYTES


@pytest.mark.slow
def test_a_revoked_device_ends(tmp_path: Path) -> None:
    told: list[str] = []
    with served(tmp_path) as server, DeviceRegistry(tmp_path / "devices.db") as registry:
        credentials = enrol(server.url, registry.invite("a"))
        with calling(credentials, told.append):
            wait_until(lambda: server.present() == ["a"])
            registry.revoke("a")
            server.office._boxes["a"]._supersede()  # its open poll ends: the next one is refused
            wait_until(lambda: bool(told) and "enrol" in told[-1])
