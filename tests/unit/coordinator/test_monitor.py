"""The coordinator's monitor over real sockets: runs as JSON, events as a stream, metrics; authorisation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from fedbpt.coordinator.monitoring import monitor as monitor_module
from fedbpt.coordinator.monitoring.feed import EventFeed
from fedbpt.coordinator.monitoring.metrics import RunMetrics
from fedbpt.coordinator.monitoring.monitor import MonitorServer
from fedbpt.errors import ConfigError
from fedbpt.runs.event_log import Journal
from fedbpt.runs.events import DeviceBack, DeviceLost, LateReport, RoundClosed, RunStarted
from fedbpt.runs.store import RunStore
from tests.support.caller import wait_until
from tests.support.fake_device import FakeDevice
from tests.support.raises import raises
from tests.support.toy_scene import Scene, StopRunError, closed, settings, stop

LATE = LateReport(device="a", round=3)


class Watched(NamedTuple):
    scene: Scene
    server: MonitorServer
    journal: Journal
    http: httpx.Client


@contextmanager
def watched(folder: Path, **options: Any) -> Iterator[Watched]:
    scene = Scene(folder / "runs.db", FakeDevice("a"), FakeDevice("b"))
    with MonitorServer(scene.store.path, "r", **options) as server:
        scene.on_event = journal = Journal(server)
        with httpx.Client(base_url=server.url, trust_env=False, timeout=60) as http:
            yield Watched(scene, server, journal, http)
    scene.store.close()


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Watched]:
    with watched(tmp_path) as found:
        yield found


def metrics(http: httpx.Client) -> dict[str, Metric]:
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {family.name.removeprefix("fedbpt_run_"): family for family in text_string_to_metric_families(answer.text)}


def value(families: dict[str, Metric], name: str, **labels: str) -> float:
    [found] = [sample.value for sample in families[name].samples if sample.labels == {"run": "r", **labels}]
    return found


def refusal(answer: httpx.Response) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/json"
    return answer.status_code, answer.json()["code"]


class Stream:
    """A stream as an EventSource reads it: (event, id, data), and the comments."""

    def __init__(self, lines: Iterator[str]) -> None:
        self.comments = 0
        self._lines = lines

    def __iter__(self) -> Iterator[tuple[str, str, Any]]:
        fields: dict[str, str] = {}
        for line in self._lines:
            if line.startswith(":"):
                self.comments += 1
            elif line:
                name, _, text = line.partition(": ")
                fields[name] = text
            elif "data" in fields:
                yield fields["event"], fields.get("id", ""), json.loads(fields["data"])
                fields = {}


@contextmanager
def stream(http: httpx.Client, after: str = "") -> Iterator[Stream]:
    headers = {"last-event-id": after} if after else {}
    with http.stream("GET", "/v1/runs/r/events", headers=headers) as answer:
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        yield Stream(answer.iter_lines())


def test_runs_are_listed_and_shown_with_rounds_metrics_and_devices(live: Watched) -> None:
    assert live.http.get("/v1/runs").json() == []
    live.scene.run(rounds=2)
    [listed] = live.http.get("/v1/runs").json()
    shown = live.http.get("/v1/runs/r").json()
    assert (listed["run"], listed["status"], listed["n_rounds"]) == ("r", "finished", 3)
    assert listed.items() <= shown.items()
    assert [line["reported"] for line in shown["rounds"]] == [["a", "b"]] * 3
    assert {"loss", "seconds", "tokens"} <= set(shown["rounds"][1]["metrics"])
    [a, b] = shown["devices"]
    assert (a["name"], b["name"], a["info"]["n_train"]) == ("a", "b", 16)
    assert a["peak_rss_bytes"] == 3 * 2**20


def test_unknown_runs_and_routes_are_json_errors(live: Watched) -> None:
    assert refusal(live.http.get("/v1/runs/other")) == (404, "unknown-run")
    assert refusal(live.http.get("/v1/runs/other/events")) == (404, "unknown-run")
    assert refusal(live.http.get("/v1/nothing")) == (404, "not-found")
    assert refusal(live.http.post("/v1/runs")) == (405, "method-not-allowed")
    assert live.http.get("/healthz").text == "ok\n"


def test_the_stream_has_every_event_and_ends_with_the_server(live: Watched) -> None:
    with stream(live.http) as events:
        live.scene.run(evaluate_every=2)
        live.server.feed._loop.call_soon_threadsafe(live.server.feed.close)  # type: ignore[union-attr]
        found = list(events)
    assert [kind for kind, _, _ in found] == [type(event).__name__ for event in live.scene.events]
    assert [data["seq"] for _, _, data in found] == list(range(1, len(found) + 1))
    assert found[-1][2]["event"]["result"]["run"] == "r"


def test_a_reader_that_reconnects_continues_after_its_last_event(live: Watched) -> None:
    for _ in range(3):
        live.journal(LATE)
    with stream(live.http) as events:
        first, second, _ = (item for _, item in zip(range(3), events, strict=False))
    with stream(live.http, after=second[1]) as events:
        assert next(iter(events))[2]["seq"] == 3
    with stream(live.http, after=first[1]) as events:
        assert next(iter(events))[2]["seq"] == 2


def test_comments_are_sent_while_nothing_happens(tmp_path: Path) -> None:
    with watched(tmp_path, heartbeat_s=0.01) as live, live.http.stream("GET", "/v1/runs/r/events") as answer:
        assert ": nothing new" in answer.iter_lines()


def test_a_stalled_reader_blocks_nobody_and_is_told_how_many_it_missed(tmp_path: Path) -> None:
    feed = EventFeed(keep_lines=5)
    with watched(tmp_path, feed=feed) as live, stream(live.http) as events:
        live.journal(LATE)
        reader = iter(events)
        assert next(reader)[2]["seq"] == 1
        big = DeviceLost(device="a", round=1, reason="x" * 100_000)
        for _ in range(500):  # far more than socket buffers hold
            live.journal(big)
        assert len(feed._lines) == 5
        read = missed = 0
        for kind, _, data in reader:
            if kind == "Missed":
                missed += data["lines"]
            else:
                read += 1
                if data["seq"] == 501:
                    break
        assert read + missed == 500
        assert missed > 0


@pytest.mark.slow
def test_a_stopping_server_does_not_wait_for_stalled_readers(tmp_path: Path) -> None:
    with watched(tmp_path) as live, stream(live.http) as events:
        for _ in range(100):
            live.journal(DeviceLost(device="a", round=1, reason="x" * 100_000))
        assert next(iter(events))
        live.server.stop()
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{live.server.url}/healthz", trust_env=False)


def test_streams_are_limited(live: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "MAX_READERS", 1)
    with stream(live.http):
        wait_until(lambda: live.server.feed.n_readers == 1)
        assert refusal(live.http.get("/v1/runs/r/events")) == (429, "too-many")
    wait_until(lambda: live.server.feed.n_readers == 0)


def test_metrics_before_and_after_a_run(live: Watched) -> None:
    before = metrics(live.http)
    assert value(before, "finished") == 0
    assert "loss" not in before
    result = live.scene.run(evaluate_every=2)
    found = metrics(live.http)
    closed = live.scene.events[-2]
    assert value(found, "finished") == 1
    assert value(found, "info", model="toy", method="pooled") == 1
    assert (value(found, "round"), value(found, "search_rounds")) == (4, 4)
    assert (value(found, "evaluations"), value(found, "tokens")) == (result.evaluations, result.tokens)
    assert value(found, "loss") == [event.loss for event in live.scene.events if hasattr(event, "loss")][-1]
    assert 0 <= value(found, "dev_accuracy") <= 1
    assert value(found, "dev_loss") == closed.score.loss  # type: ignore[union-attr]
    assert (value(found, "devices", state="live"), value(found, "devices", state="lost")) == (2, 0)
    for device in result.devices:
        assert value(found, "bytes_up", device=device.name) == device.bytes_up
        assert value(found, "bytes_down", device=device.name) == device.bytes_down
    counts = {s.labels["purpose"]: s.value for s in found["round_seconds"].samples if s.name.endswith("_count")}
    sums = [s.value for s in found["round_seconds"].samples if s.name.endswith("_sum")]
    assert counts == {"selection": 1, "search": 4}
    assert sum(sums) == pytest.approx(value(found, "seconds")) == pytest.approx(result.seconds)


def test_lost_and_late_devices_are_counted_by_name(live: Watched) -> None:
    live.scene.run(rounds=1)
    lost = DeviceLost(device="b", round=1, reason="")
    for event in (lost, DeviceBack(device="b", round=2), lost, LATE):
        live.journal(event)
    found = metrics(live.http)
    assert (value(found, "devices", state="live"), value(found, "devices", state="lost")) == (1, 1)
    assert (value(found, "device_losses", device="b"), value(found, "late_reports", device="a")) == (2, 1)


def test_a_resumed_run_counts_only_the_seconds_of_its_own_rounds(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "runs.db", FakeDevice("a", slow_s=0.05))
    scene.when(closed(3), stop)
    with pytest.raises(StopRunError):
        scene.run()
    scene.store.close()
    with watched(tmp_path) as live:
        live.scene.run()
        found = metrics(live.http)
        [total] = [s.value for s in found["round_seconds"].samples if s.name.endswith("_sum")]
        [count] = [s.value for s in found["round_seconds"].samples if s.name.endswith("_count")]
        with RunStore(tmp_path / "runs.db") as store:
            assert total == pytest.approx(store.history("r")[-1].metrics["seconds"])
        assert (count, value(found, "round")) == (1, 4)


def test_a_fresh_run_does_not_count_seconds_of_the_run_it_replaces() -> None:
    metrics = RunMetrics("r", seconds=1000.0)
    started = RunStarted(
        run="r", devices=("a",), live=("a",), model_name="m", model_fingerprint="f", resumed=0, settings=settings()
    )
    first = RoundClosed(
        round=0, purpose="selection", searched=0, reported=("a",), missing=(), loss=1.0, evaluations=0, tokens=0,
        seconds=2.5, bytes_up=0, bytes_down=0,
    )  # fmt: skip
    journal = Journal(metrics)
    journal(started)
    journal(first)
    found = {family.name: family for family in metrics.families({})}
    assert [s.value for s in found["run_round_seconds"].samples if s.suffix == "_sum"] == [2.5]


# --- authorisation ---------------------------------------------------------------------------------------------------


def test_with_a_token_readers_must_send_it(tmp_path: Path) -> None:
    with watched(tmp_path, token="right") as live:
        for headers in ({}, {"authorization": "Bearer wrong"}):
            assert refusal(live.http.get("/metrics", headers=headers)) == (401, "unauthorized")
            assert refusal(live.http.get("/v1/runs/r/events", headers=headers)) == (401, "unauthorized")
        right = {"authorization": "Bearer right", "host": "coordinator.lan"}
        assert live.http.get("/v1/runs", headers=right).status_code == 200
        assert live.http.get("/healthz").status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8400", "127.0.0.1.evil.example", "[", ""])
def test_without_a_token_only_loopback_hosts_are_served(live: Watched, host: str) -> None:
    assert refusal(live.http.get("/v1/runs", headers={"host": host})) == (421, "wrong-host")
    assert live.http.get("/v1/runs", headers={"host": "localhost:1"}).status_code == 200


def test_beyond_loopback_token_and_encryption_are_required(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    with raises(ConfigError):
        MonitorServer(path, "r", "0.0.0.0", allow_insecure=True)
    with raises(ConfigError):
        MonitorServer(path, "r", "0.0.0.0", token="right")
    with MonitorServer(path, "r", "0.0.0.0", token="right", allow_insecure=True) as server:
        answer = httpx.get(f"http://127.0.0.1:{server.port}/healthz", trust_env=False)
        assert answer.status_code == 200
