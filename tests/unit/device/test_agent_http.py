"""The device's HTTP routes and server: bodies, refusals, tokens, addresses."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedbpt.coordinator.clients import HttpClient
from fedbpt.device.agent import AgentService
from fedbpt.device.agent.server import AgentServer
from fedbpt.errors import ConfigError, DeviceRefusedError, FedbptError, ModelFileError
from fedbpt.net.bodies import STATUS_OF_CODE
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import DeviceInfo, ErrorReply, RoundProgress, RoundReport
from tests.contract.test_clients import plan
from tests.support.fake_device import FakeDevice
from tests.support.raises import raises

MSGPACK = {"content-type": codec.CONTENT_TYPE}


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with AgentServer(AgentService(FakeDevice("a"))) as server:
        with httpx.Client(base_url=server.url, trust_env=False) as client:
            yield client


def refusal(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, codec.decode(response.content, ErrorReply).code


def test_a_round_goes_over_plain_http(http: httpx.Client) -> None:
    accepted = http.post("/v1/rounds/r/1", content=codec.encode(plan()), headers=MSGPACK)
    assert accepted.status_code == 202
    assert codec.decode(accepted.content, RoundProgress).round == 1
    done = http.get("/v1/rounds/r/1?wait=5")
    assert (done.status_code, done.headers["content-type"]) == (200, codec.CONTENT_TYPE)
    assert codec.decode(done.content, RoundReport).device == "a"
    assert http.delete("/v1/rounds/r/1").status_code == 204
    assert refusal(http.get("/v1/rounds/r/1")) == (404, "unknown-round")


def test_people_get_json_and_may_send_it(http: httpx.Client) -> None:
    json = {"content-type": "application/json; charset=utf-8", "accept": "application/json"}
    status = http.get("/v1/status", headers=json)
    assert codec.decode_json(status.content, DeviceInfo).name == "a"
    assert http.post("/v1/rounds/r/2", content=codec.encode_json(plan(round=2)), headers=json).status_code == 202
    wrong = http.post("/v1/rounds/r/2", content=b"{}", headers=json)
    assert wrong.status_code == 400
    assert codec.decode_json(wrong.content, ErrorReply).code == "malformed"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_another_content_type_is_refused(http: httpx.Client, content_type: str) -> None:
    response = http.post("/v1/rounds/r/1", content=codec.encode(plan()), headers={"content-type": content_type})
    assert refusal(response) == (415, "wrong-content-type")


@pytest.mark.parametrize("body", [b"", b"\xff\x00", codec.encode(plan())[:-1], msgspec.msgpack.encode({"run": 1})])
@pytest.mark.parametrize("path", ["/v1/rounds/r/1", "/v1/evaluate"])
def test_a_malformed_body_is_refused(http: httpx.Client, path: str, body: bytes) -> None:
    assert refusal(http.post(path, content=body, headers=MSGPACK)) == (400, "malformed")


def test_a_plan_sent_to_another_rounds_address_is_refused(http: httpx.Client) -> None:
    assert refusal(http.post("/v1/rounds/r/9", content=codec.encode(plan()), headers=MSGPACK)) == (400, "malformed")


def test_a_body_over_the_limit_is_refused_with_or_without_its_length(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "MAX_BODY_BYTES", 1000)
    assert refusal(http.post("/v1/evaluate", content=b"\0" * 1001, headers=MSGPACK)) == (413, "too-large")
    chunks = (b"\0" * 100 for _ in range(11))
    assert refusal(http.post("/v1/evaluate", content=chunks, headers=MSGPACK)) == (413, "too-large")


@pytest.mark.parametrize("wait", ["x", "-1", "nan", "inf"])
def test_an_invalid_wait_is_refused(http: httpx.Client, wait: str) -> None:
    assert refusal(http.get(f"/v1/rounds/r/1?wait={wait}")) == (400, "malformed")


def test_unknown_addresses_and_methods_have_a_reason(http: httpx.Client) -> None:
    assert refusal(http.get("/v1/nothing")) == (404, "not-found")
    assert refusal(http.get("/v1/rounds/r/one")) == (404, "not-found")
    assert refusal(http.put("/v1/status")) == (405, "method-not-allowed")
    assert refusal(http.get("/v1/evaluate/0123")) == (404, "unknown-evaluation")
    assert refusal(http.get("/v1/questions/0123")) == (404, "unknown-question")
    assert refusal(http.get("/v1/questions/0123?seen=-1")) == (400, "malformed")


def test_every_refusal_but_stopping_is_a_4xx() -> None:
    assert {code for code, status in STATUS_OF_CODE.items() if not 400 <= status < 500} == {"stopping"}


def test_health_and_metrics_are_plain_text(http: httpx.Client) -> None:
    assert http.get("/healthz").text == "ok\n"
    metrics = http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(metrics.text)}
    assert {name: family.type for name, family in families.items()} == {
        "fedbpt_work": "counter",
        "fedbpt_busy": "gauge",
        "fedbpt_rss_bytes": "gauge",
        "fedbpt_peak_rss_bytes": "gauge",
    }
    assert {sample.labels["state"] for sample in families["fedbpt_work"].samples} >= {"done", "failed"}
    assert families["fedbpt_peak_rss_bytes"].samples[0].value > 0


def test_with_a_token_only_clients_that_send_it_are_served() -> None:
    with AgentServer(AgentService(FakeDevice("a")), token="right") as server:
        with httpx.Client(base_url=server.url, trust_env=False) as client:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic right"}):
                for path in ("/v1/status", "/metrics", "/v1/nothing"):
                    assert refusal(client.get(path, headers=headers)) == (401, "unauthorized")
            right = {"authorization": "Bearer right"}
            guesses = [client.get("/v1/status") for _ in range(5)]
            assert refusal(guesses[-1]) == (429, "too-many")
            assert int(guesses[-1].headers["retry-after"]) > 0
            assert client.get("/v1/status", headers=right).status_code == 200
            assert client.get("/healthz").status_code == 200


def test_a_client_with_the_token_is_served_and_others_are_refused() -> None:
    async def ask(token: str | None) -> str:
        client = HttpClient(server.url, token=token)
        try:
            return (await client.status()).name
        finally:
            await client.aclose()

    with AgentServer(AgentService(FakeDevice("a")), token="right") as server:
        assert asyncio.run(ask("right")) == "a"
        for token in (None, "wrong"):
            with raises(DeviceRefusedError, code="unauthorized"):
                asyncio.run(ask(token))


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with raises(FedbptError) as caught:
            AgentServer(AgentService(FakeDevice("a")), port=port)
    assert str(port) in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "device.example"])
def test_an_address_beyond_loopback_must_be_allowed(host: str) -> None:
    with raises(ConfigError) as caught:
        AgentServer(AgentService(FakeDevice("a")), host)
    assert "--allow-insecure" in str(caught.value)


def test_an_address_beyond_loopback_works_where_it_is_allowed() -> None:
    AgentServer(AgentService(FakeDevice("a")), "0.0.0.0", allow_insecure=True).stop()


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("127.0.0.1", -1), ("192.0.2.1", 0)])
def test_an_impossible_address_is_named(host: str, port: int) -> None:
    with pytest.raises(FedbptError) as caught:
        AgentServer(AgentService(FakeDevice("a")), host, port, allow_insecure=True)
    assert (str(port) if port else host) in str(caught.value)


def test_a_paused_device_reports_the_reason_and_can_resume_or_be_cancelled() -> None:
    reasons = ["on battery"]
    device = FakeDevice("a", slow_s=0.01)
    with AgentServer(AgentService(device, pause=lambda: reasons[-1])) as server:
        with httpx.Client(base_url=server.url, trust_env=False) as client:

            def progress() -> RoundProgress:
                return codec.decode(client.get("/v1/rounds/r/1").content, RoundProgress)

            client.post("/v1/rounds/r/1", content=codec.encode(plan()), headers=MSGPACK)
            wait_until(lambda: bool(progress().paused))
            assert (progress().state, progress().paused) == ("running", "on battery")
            assert codec.decode(client.get("/v1/status").content, DeviceInfo).paused == "on battery"

            assert client.delete("/v1/rounds/r/1").status_code == 204
            wait_until(lambda: not codec.decode(client.get("/v1/status").content, DeviceInfo).paused)

            client.post("/v1/rounds/r/1", content=codec.encode(plan()), headers=MSGPACK)
            wait_until(lambda: bool(progress().paused))
            reasons.append("")
            assert client.get("/v1/rounds/r/1?wait=20").status_code == 200
            assert codec.decode(client.get("/v1/status").content, DeviceInfo).paused == ""


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def test_a_changed_model_file_is_named_in_the_devices_log(caplog: pytest.LogCaptureFixture) -> None:
    device = FakeDevice("a")
    device.fail = ModelFileError("model.gguf is no longer the file that was loaded")
    with AgentServer(AgentService(device)) as server:
        with httpx.Client(base_url=server.url, trust_env=False) as client:
            client.post("/v1/rounds/r/1", content=codec.encode(plan()), headers=MSGPACK)
            failed = client.get("/v1/rounds/r/1?wait=5")
    assert "model.gguf" in codec.decode(failed.content, ErrorReply).message
    [record] = [record for record in caplog.records if record.name == "fedbpt.device.agent.service"]
    assert "model.gguf" in record.getMessage()


def test_a_plan_for_other_devices_is_refused(http: httpx.Client) -> None:
    body = codec.encode(plan(round=7))
    assert refusal(http.post("/v1/rounds/r/7?share=1e-9", content=body, headers=MSGPACK)) == (422, "not-drawn")
    assert http.post("/v1/rounds/r/7?share=1.0", content=body, headers=MSGPACK).status_code == 202


@pytest.mark.parametrize("share", ["", "0", "-1", "1.1", "nan", "inf", "much"])
def test_a_malformed_share_is_refused(http: httpx.Client, share: str) -> None:
    body = codec.encode(plan(round=8))
    response = http.post(f"/v1/rounds/r/8?share={share}", content=body, headers=MSGPACK)
    assert refusal(response) == (400, "malformed")
