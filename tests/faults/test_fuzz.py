"""Frames that no fedbpt sends: a device takes what is a plan and refuses the rest with a 4xx; it never breaks."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import httpx
import pytest

from fedbpt import wire
from fedbpt.agent import AgentService
from fedbpt.agent.http import build_app
from fedbpt.errors import ScoringInterrupted
from fedbpt.messages import ErrorReply, RoundPlan
from tests.contract.test_clients import plan
from tests.fake_device import FakeDevice
from tests.faults.conftest import ALL

FRAMES = 1_000_000 if ALL else 5_000
PATHS = ("/v1/rounds/r/1", "/v1/evaluate", "/v1/rounds/r/-1", "/v1/rounds/r/99999999999999999999", "/v1/rounds/%00/1")
TYPES = (*[wire.CONTENT_TYPE] * 8, "application/json", "text/plain", "", f"{wire.CONTENT_TYPE}; charset=x")


class Unwilling(FakeDevice):
    """Takes any plan and does nothing of it."""

    def run(self, *_: Any) -> Any:
        raise ScoringInterrupted("not here")

    evaluate = run


def mutated(rng: random.Random, frame: bytes) -> bytes:
    """``frame`` with some of it changed, cut out, repeated or made up."""
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
            case 4 if data:  # MessagePack's own markers: lengths of up to 2³²
                data[at % len(data)] = rng.choice((0xC1, 0xC6, 0xC9, 0xCB, 0xD3, 0xDB, 0xDD, 0xDF))
            case _:
                del data[at:]
    return bytes(data)


@pytest.mark.timeout(7200 if ALL else 300)
def test_no_frame_breaks_a_device() -> None:
    rng = random.Random(11)
    frame = wire.encode(plan())
    service = AgentService(Unwilling("a"))
    taken = refused = 0

    async def send() -> None:
        nonlocal taken, refused
        transport = httpx.ASGITransport(build_app(service))  # which lets an exception of the application through
        async with httpx.AsyncClient(transport=transport, base_url="http://device") as http:
            for _ in range(FRAMES):
                body = mutated(rng, frame) if rng.random() < 0.95 else rng.randbytes(rng.randrange(200))
                path = PATHS[0] if rng.random() < 0.8 else rng.choice(PATHS)
                answer = await http.post(path, content=body, headers={"content-type": rng.choice(TYPES)})
                if answer.status_code == 202:
                    assert wire.decode(body, RoundPlan).round == 1
                    taken += 1
                    continue
                assert 400 <= answer.status_code < 500, (answer.status_code, body)
                wire.decode(answer.content, ErrorReply)
                refused += 1

    try:
        asyncio.run(send())
    finally:
        service.close()
    assert (taken + refused, refused > taken) == (FRAMES, True)
    assert service.counts["done"] == 0
