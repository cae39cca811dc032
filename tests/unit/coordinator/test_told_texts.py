"""A device that sends 15 MiB of escape sequences over a socket: what is stored, logged and shown of it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fedbpt.aggregation.pooled import Pooled
from fedbpt.coordinator.clients import HttpClient
from fedbpt.coordinator.federation import Federation
from fedbpt.device.agent import AgentService
from fedbpt.device.agent.server import AgentServer
from fedbpt.display.console import RunDisplay
from fedbpt.net.server import HttpServer
from fedbpt.plain_text import MOST_TOLD
from fedbpt.protocol import codec
from fedbpt.runs.event_log import Journal, LogFile
from fedbpt.runs.events import DeviceLost, Event
from fedbpt.runs.store import RunStore
from tests.support.fake_device import FakeDevice
from tests.support.toy_scene import D, ToyTask, settings

TOLD = "\x1b[2J\x1b]0;owned\x07 " * 2**20


async def status(_request: Request) -> Response:
    info = msgspec.to_builtins(FakeDevice("liar").info())
    return Response(msgspec.msgpack.encode({**info, "model_name": TOLD}), media_type=codec.CONTENT_TYPE)


async def fail(_request: Request) -> Response:
    body = msgspec.msgpack.encode({"code": "work-failed", "message": TOLD})
    return Response(body, 500, media_type=codec.CONTENT_TYPE)


def test_a_devices_long_text_is_stored_logged_and_shown_as_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    routes = [Route("/v1/status", status), Route("/{rest:path}", fail, methods=["GET", "POST", "DELETE"])]
    lost: list[DeviceLost] = []
    with (
        HttpServer(Starlette(routes=routes), "127.0.0.1", 0) as liar,
        AgentServer(AgentService(FakeDevice("honest"))) as honest,
        RunStore(tmp_path / "runs.db") as store,
        LogFile(tmp_path / "log.jsonl") as log,
        RunDisplay() as display,
    ):
        journal = Journal(log)

        def told(event: Event) -> None:
            journal(event)
            display(event)
            if isinstance(event, DeviceLost):
                lost.append(event)

        clients = [HttpClient(honest.url, "honest"), HttpClient(liar.url, "liar", retry_s=0.1)]
        run = Federation(clients, ToyTask(), settings(rounds=3), Pooled(D, popsize=6, seed=3), store, "r", told).run()
        reasons = [reason for line in store.history("r") for reason in line.lost.values()]
    assert run.rounds == 3
    assert lost
    assert reasons
    for reason in (*reasons, *(event.reason for event in lost)):
        assert len(reason) <= MOST_TOLD
        assert "\x1b" not in reason
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2**20
    shown = capfd.readouterr().err
    assert "liar is lost" in shown
    assert "\x1b]" not in shown
    assert "\x1b[2J" not in shown
