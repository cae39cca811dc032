"""Mutated frames: valid messages are accepted, others refused with a 4xx; nothing breaks."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedbpt.aggregation.pooled import Pooled
from fedbpt.coordinator.clients.mailbox import PostOffice
from fedbpt.coordinator.devices.enrolment import DeviceRegistry
from fedbpt.coordinator.service.http import build_app as build_coordinator
from fedbpt.device.agent import AgentService
from fedbpt.device.agent.http import build_app
from fedbpt.errors import ScoringInterrupted
from fedbpt.net.tokens import digest, new_token
from fedbpt.protocol import codec
from fedbpt.protocol.polling import ENROL_PATH, POLL_PATH, REPLY_PATH, Enrolment, Poll, Reply, Request
from fedbpt.protocol.rounds import ErrorReply, RoundPlan
from fedbpt.search.compact_plans import short_plan
from tests.contract.test_clients import plan
from tests.faults.conftest import ALL
from tests.support.fake_device import FakeDevice

FRAMES = 1_000_000 if ALL else 5_000
PATHS = (
    "/v1/rounds/r/1",
    "/v1/evaluate",
    "/v1/questions",
    "/v1/rounds/r/-1",
    "/v1/rounds/r/99999999999999999999",
    "/v1/rounds/%00/1",
)
TYPES = (*[codec.CONTENT_TYPE] * 8, "application/json", "text/plain", "", f"{codec.CONTENT_TYPE}; charset=x")


class Unwilling(FakeDevice):
    """Accepts any plan and does no work."""

    def run(self, *_: Any) -> Any:
        raise ScoringInterrupted("not here")

    evaluate = run


def mutated(rng: random.Random, frame: bytes) -> bytes:
    """``frame`` with some bytes changed, removed, repeated or inserted."""
    data = bytearray(frame)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + rng.randrange(1, 9)] = b""
            case 2:
                data[at:at] = data[at : at + rng.randrange(1, 64)]
            case 3:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 4 if data:  # MessagePack markers with lengths of up to 2³²
                data[at % len(data)] = rng.choice((0xC1, 0xC6, 0xC9, 0xCB, 0xD3, 0xDB, 0xDD, 0xDF))
            case _:
                del data[at:]
    return bytes(data)


@pytest.mark.timeout(7200 if ALL else 300)
def test_no_frame_breaks_a_device() -> None:
    rng = random.Random(11)
    search = Pooled(3, popsize=4)
    pooled = plan(work=search.work(0))
    frames = [codec.encode(plan()), codec.encode(short_plan(pooled, search.history(), 0))]
    service = AgentService(Unwilling("a"))
    taken = refused = 0

    async def send() -> None:
        nonlocal taken, refused
        transport = httpx.ASGITransport(build_app(service))  # which lets an exception of the application through
        async with httpx.AsyncClient(transport=transport, base_url="http://device") as http:
            for _ in range(FRAMES):
                body = mutated(rng, rng.choice(frames)) if rng.random() < 0.95 else rng.randbytes(rng.randrange(200))
                path = PATHS[0] if rng.random() < 0.8 else rng.choice(PATHS)
                answer = await http.post(path, content=body, headers={"content-type": rng.choice(TYPES)})
                if answer.status_code == 202:
                    assert codec.decode(body, RoundPlan).round == 1
                    taken += 1
                    continue
                assert 400 <= answer.status_code < 500, (answer.status_code, body)
                codec.decode(answer.content, ErrorReply)
                refused += 1

    try:
        asyncio.run(send())
    finally:
        service.close()
    assert (taken + refused, refused > taken) == (FRAMES, True)
    assert service.counts["done"] == 0


@pytest.mark.timeout(7200 if ALL else 300)
def test_no_frame_breaks_a_coordinator(tmp_path: Path) -> None:
    rng = random.Random(12)
    id = f"{7:032x}"
    frames = {
        POLL_PATH: codec.encode(Poll(holding=(f"{8:032x}",))),
        REPLY_PATH.format(id=id): codec.encode(Reply(status=200, content_type="x", body=b"12345")),
        ENROL_PATH: codec.encode(Enrolment(code="ABCD-EFGH-JKLM", token_digest=32 * b"x")),
    }
    seen: Counter[int] = Counter()

    async def send(registry: DeviceRegistry, token: str) -> None:
        office, unlimited = PostOffice(), (1e9, 10**9)
        office.open()
        transport = httpx.ASGITransport(build_coordinator(registry, office, unlimited, unlimited))
        async with httpx.AsyncClient(transport=transport, base_url="http://coordinator") as http:
            waiting: asyncio.Future[Any] | None = None
            for _ in range(FRAMES):
                if waiting is None or waiting.done():  # a pending request, so that no poll is held
                    request = Request(id=id, method="GET", path="/v1/status")
                    waiting = asyncio.ensure_future(office.box("a").exchange(request, 3600.0))
                    await asyncio.sleep(0)
                path = rng.choice(list(frames))
                body = mutated(rng, frames[path]) if rng.random() < 0.95 else rng.randbytes(rng.randrange(200))
                bearer = token if rng.random() < 0.9 else mutated(rng, token.encode()).hex()
                headers = {"content-type": rng.choice(TYPES), "authorization": f"Bearer {bearer}"}
                answer = await http.post(path, content=body, headers=headers)
                seen[answer.status_code] += 1
                if answer.status_code >= 400:
                    codec.decode(answer.content, ErrorReply)
            waiting.cancel()

    with DeviceRegistry(tmp_path / "devices.db") as registry:
        secret = new_token()
        registry.enrol(registry.invite("a"), digest(secret))
        registry.invite("b")
        before = registry.devices()
        asyncio.run(send(registry, f"a~{secret}"))
        assert registry.devices() == before
    assert all(status in (200, 204) or 400 <= status < 500 for status in seen), seen
    assert min(seen[200], seen[204], seen[400], seen[401]) > 0
    assert seen.total() == FRAMES
