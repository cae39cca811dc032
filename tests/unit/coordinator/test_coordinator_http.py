"""The coordinator's routes: refusals and their codes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from fedbpt.coordinator.devices.enrolment import DeviceRegistry
from fedbpt.coordinator.service.http import SMALL_BODY_BYTES
from fedbpt.coordinator.service.server import CoordinatorServer
from fedbpt.errors import ConfigError
from fedbpt.net import tokens
from fedbpt.protocol import codec
from fedbpt.protocol.polling import (
    MAX_ENVELOPE_BYTES,
    PACED_HEADER,
    Delivery,
    Enrolled,
    Enrolment,
    Poll,
    Reply,
    Request,
)
from fedbpt.protocol.rounds import ErrorReply
from fedbpt.protocol.specs import Message
from tests.support.raises import raises

ID = "0" * 32
REPLY = Reply(status=200)


class Caller:
    """Raw requests as devices send them."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        self.registry = DeviceRegistry(folder / "devices.db")
        self.server = CoordinatorServer(self.registry, **limits)
        self.server.start()
        self.http = httpx.Client(base_url=self.server.url, trust_env=False)

    def close(self) -> None:
        self.http.close()
        self.server.stop()
        self.registry.close()

    def enrol(self, device: str) -> str:
        """A bearer token."""
        secret = tokens.new_token()
        enrolment = Enrolment(code=self.registry.invite(device), token_digest=tokens.digest(secret))
        found = codec.decode(self.post("/v1/enrol", enrolment).content, Enrolled)
        assert found.device == device
        return f"{device}~{secret}"

    def post(self, path: str, body: Message | bytes, bearer: str = "", **headers: str) -> httpx.Response:
        content = codec.encode(body) if isinstance(body, Message) else body
        token = {"authorization": f"Bearer {bearer}"} if bearer else {}
        return self.http.post(path, content=content, headers={"content-type": codec.CONTENT_TYPE, **token, **headers})

    def poll(self, bearer: str) -> httpx.Response:
        return self.post("/v1/mailbox/poll", Poll(), bearer)


@pytest.fixture
def caller(tmp_path: Path) -> Iterator[Caller]:
    caller = Caller(tmp_path)
    yield caller
    caller.close()


def refusal(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, codec.decode(response.content, ErrorReply).code


def test_an_enrolled_device_polls(caller: Caller) -> None:
    answer = caller.poll(caller.enrol("a"))
    assert (answer.status_code, codec.decode(answer.content, Delivery).requests) == (200, ())
    assert caller.server.present() == ["a"]


def test_a_device_that_obeys_is_told_when_to_call_and_an_older_one_is_held(caller: Caller) -> None:
    bearer = caller.enrol("a")
    caller.server.office.pace("r", lambda _device: 41.2)
    waits = Poll(wait_s=30.0)
    told = caller.post("/v1/mailbox/poll", waits, bearer, **{PACED_HEADER: "1"})
    assert (told.status_code, told.headers["retry-after"]) == (200, "42")
    assert codec.decode(told.content, Delivery).requests == ()
    assert 40.0 < caller.server.office.due_s("a") <= 42.0
    assert caller.server.present() == ["a"]
    older = caller.post("/v1/mailbox/poll", Poll(), bearer)
    assert "retry-after" not in older.headers
    assert caller.server.office.due_s("a") == 0.0


def test_a_device_with_work_is_never_told_to_call_later(caller: Caller) -> None:
    bearer = caller.enrol("a")
    caller.poll(bearer)
    caller.server.office.pace("r", lambda _device: 41.2)
    waiting = _lay(caller, Request(id=ID, method="GET", path="/v1/status"))
    for holding in ((), (ID,)):
        answer = caller.post("/v1/mailbox/poll", Poll(holding=holding), bearer, **{PACED_HEADER: "1"})
        assert "retry-after" not in answer.headers
    caller.post(f"/v1/mailbox/replies/{ID}", REPLY, bearer)
    assert waiting.result(10) == REPLY


@pytest.mark.parametrize("path", ["/v1/mailbox/poll", f"/v1/mailbox/replies/{ID}"])
@pytest.mark.parametrize("bearer", ["", "a~wrong", "b~wrong"])
def test_without_its_token_a_device_is_refused(caller: Caller, path: str, bearer: str) -> None:
    caller.enrol("a")
    answer = caller.post(path, Poll(), bearer)
    assert refusal(answer) == (401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert caller.server.present() == []


def test_a_large_body_refused_before_its_end_gets_the_reason(caller: Caller) -> None:
    for _ in range(5):
        answer = caller.post(f"/v1/mailbox/replies/{ID}", bytes(MAX_ENVELOPE_BYTES), "a~wrong")
        assert refusal(answer) == (401, "unauthorized")


def test_a_revoked_device_is_refused_from_its_next_call_on(caller: Caller) -> None:
    bearer = caller.enrol("a")
    assert caller.poll(bearer).status_code == 200
    caller.registry.revoke("a")
    assert refusal(caller.poll(bearer)) == (401, "unauthorized")


def test_a_code_that_was_used_is_refused(caller: Caller) -> None:
    code = caller.registry.invite("a")
    assert caller.post("/v1/enrol", Enrolment(code=code, token_digest=bytes(32))).status_code == 200
    assert (
        caller.post("/v1/enrol", Enrolment(code=code, token_digest=bytes(32))).status_code == 200
    )  # its first response was lost
    assert refusal(caller.post("/v1/enrol", Enrolment(code=code, token_digest=b"1" * 32))) == (403, "bad-code")


def test_a_reply_to_another_devices_request_is_refused(caller: Caller) -> None:
    a, b = caller.enrol("a"), caller.enrol("b")
    caller.poll(a)
    caller.poll(b)
    waiting = _lay(caller, Request(id=ID, method="GET", path="/v1/status"))
    assert refusal(caller.post(f"/v1/mailbox/replies/{ID}", REPLY, b)) == (404, "unknown-request")
    assert caller.post(f"/v1/mailbox/replies/{ID}", REPLY, a).status_code == 204
    assert waiting.result(10) == REPLY
    assert caller.post(f"/v1/mailbox/replies/{ID}", REPLY, a).status_code == 204
    assert refusal(caller.post(f"/v1/mailbox/replies/{ID}", Reply(status=201), a)) == (409, "conflict")


def _lay(caller: Caller, request: Request) -> Any:
    import asyncio

    loop = caller.server.office._loop
    assert loop is not None
    waiting = asyncio.run_coroutine_threadsafe(caller.server.office.exchange("a", request, 10.0), loop)
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0.05), loop).result(10)  # it is in the mailbox now
    return waiting


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff",
        msgspec.msgpack.encode({"holding": [], "more": 1}),
        msgspec.msgpack.encode({"holding": ["not-an-id"]}),
        msgspec.msgpack.encode({"holding": [ID] * 65}),
        msgspec.msgpack.encode({"wait_s": -1.0}),
        msgspec.msgpack.encode({"wait_s": float("nan")}),
        msgspec.msgpack.encode({"protocol": 2}),
    ],
)
def test_a_malformed_poll_is_refused(caller: Caller, body: bytes) -> None:
    assert refusal(caller.post("/v1/mailbox/poll", body, caller.enrol("a"))) == (400, "malformed")


@pytest.mark.parametrize("change", [{"status": 100}, {"status": 600}, {"content_type": "x" * 129}, {"more": 1}])
def test_a_malformed_reply_is_refused(caller: Caller, change: dict[str, Any]) -> None:
    body = msgspec.msgpack.encode({"status": 200, **change})
    assert refusal(caller.post(f"/v1/mailbox/replies/{ID}", body, caller.enrol("a"))) == (400, "malformed")


def test_bodies_over_their_limits_are_refused(caller: Caller) -> None:
    bearer = caller.enrol("a")
    for path, limit in (
        ("/v1/enrol", SMALL_BODY_BYTES),
        ("/v1/mailbox/poll", SMALL_BODY_BYTES),
        (f"/v1/mailbox/replies/{ID}", MAX_ENVELOPE_BYTES),
    ):
        assert refusal(caller.post(path, bytes(limit + 1), bearer)) == (413, "too-large")


def test_other_types_methods_and_addresses_are_refused(caller: Caller) -> None:
    bearer = caller.enrol("a")
    answer = caller.post("/v1/mailbox/poll", Poll(), bearer, **{"content-type": "text/plain"})
    assert refusal(answer) == (415, "wrong-content-type")
    assert refusal(caller.http.get("/v1/mailbox/poll")) == (405, "method-not-allowed")
    assert refusal(caller.http.get("/v1/runs")) == (404, "not-found")
    assert caller.http.get("/healthz").text == "ok\n"


def test_guessing_codes_or_tokens_is_rate_limited_and_valid_tokens_are_not(tmp_path: Path) -> None:
    caller = Caller(tmp_path, guess_limit=(0.001, 3))
    try:
        bearer = caller.enrol("a")  # the first of three
        wrong = Enrolment(code="wrong", token_digest=bytes(32))
        assert refusal(caller.post("/v1/enrol", wrong)) == (403, "bad-code")
        assert refusal(caller.poll("a~wrong")) == (401, "unauthorized")
        for answer in (caller.post("/v1/enrol", wrong), caller.poll("a~wrong")):
            assert refusal(answer) == (429, "too-many")
            assert 0 < int(answer.headers["retry-after"]) <= 1000
        assert caller.poll(bearer).status_code == 200
    finally:
        caller.close()


def test_a_device_that_calls_too_often_gets_retry_after(tmp_path: Path) -> None:
    caller = Caller(tmp_path, device_limit=(0.001, 2))
    try:
        a, b = caller.enrol("a"), caller.enrol("b")
        assert [caller.poll(a).status_code for _ in range(3)] == [200, 200, 429]
        assert int(caller.poll(a).headers["retry-after"]) > 0
        assert caller.poll(b).status_code == 200
    finally:
        caller.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1"])
def test_beyond_loopback_encryption_or_allow_insecure_is_required(tmp_path: Path, host: str) -> None:
    with DeviceRegistry(tmp_path / "devices.db") as registry:
        with raises(ConfigError):
            CoordinatorServer(registry, host)
        CoordinatorServer(registry, "0.0.0.0", allow_insecure=True).stop()
