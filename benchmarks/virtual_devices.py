"""Many polling devices in one process, whose work takes no time, to measure their coordinator.

They use the protocol of `fedbpt.device.agent.poller` over two persistent connections each, which they close where they
are told to call later, but minimal HTTP code, synthetic losses, and the digest that is in a plan to be replayed.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np

from fedbpt.device.agent.poller import PAUSES_S, Backoff
from fedbpt.net.tokens import Credentials
from fedbpt.protocol import codec
from fedbpt.protocol.polling import MAX_PAUSE_S, PACED_HEADER, POLL_PATH, REPLY_PATH, Delivery, Poll, Reply, Request
from fedbpt.protocol.rounds import DeviceInfo, PooledResult, ReplayWork, RoundPlan, RoundReport
from fedbpt.protocol.specs import Array
from fedbpt.tasks import Task, Template

_deliveries = msgspec.msgpack.Decoder(Delivery)
_plans = msgspec.msgpack.Decoder(RoundPlan)


TASK = Task(name="toy", labels=("x", "y"), templates=(Template(pattern="{text} It was", label_words=(" a", " b")),))


def info_of(name: str) -> DeviceInfo:
    return DeviceInfo(
        name=name, version="0", model_fingerprint="sha256:toy", model_name="toy", backend="toy", n_train=16,
        n_dev=0, n_test=0, ram_bytes=2**30, rss_bytes=2**20, peak_rss_bytes=2**20, task=TASK.identity,
    )  # fmt: skip


def report_on(plan: RoundPlan, losses: np.ndarray[Any, Any]) -> RoundReport:
    whole = plan.work.plan_digest if isinstance(plan.work, ReplayWork) else codec.digest(plan)
    return RoundReport(
        run=plan.run, round=plan.round, device=plan.device, plan_digest=whole,
        result=PooledResult(losses=Array.of(losses, "<f4")), n_texts=8, evaluations=len(losses), tokens=128,
        seconds=0.001, peak_rss_bytes=2**20,
    )  # fmt: skip


class Connection:
    """One persistent connection; one request at a time. ``paced``: the coordinator may say when to call again."""

    def __init__(self, credentials: Credentials, paced: bool = True, tls: ssl.SSLContext | None = None) -> None:
        address = urlsplit(credentials.coordinator)
        self._host, self._port, self._tls = address.hostname, address.port, tls
        heads = {
            "host": address.netloc,
            "authorization": f"Bearer {credentials.bearer}",
            "accept": codec.CONTENT_TYPE,
            "content-type": codec.CONTENT_TYPE,
            **({PACED_HEADER: "1"} if paced else {}),
        }
        self._head = "".join(f"{name}: {value}\r\n" for name, value in heads.items()) + "content-length: "
        self.retry_after_s = 0.0
        """Of the last response."""
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._lock = asyncio.Lock()

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Send a request; returns status and body. Raises OSError or EOFError."""
        async with self._lock:
            try:
                if self._streams is None:
                    self._streams = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
                reader, writer = self._streams
                writer.write(f"POST {path} HTTP/1.1\r\n{self._head}{len(body)}\r\n\r\n".encode() + body)
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                _, _, length = head.partition(b"content-length: ")
                content = await reader.readexactly(int(length.partition(b"\r\n")[0])) if length else b""
                _, _, seconds = head.partition(b"retry-after: ")
                self.retry_after_s = float(seconds.partition(b"\r\n")[0] or 0)
                if b"connection: close" in head:
                    self.close()
                return int(head[9:12]), content
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


class VirtualDevice:
    """Reports after a random time up to ``work_s`` seconds. ``seconds``: the time its reports took to arrive.

    ``paced``: it calls when it is told.
    """

    def __init__(
        self, credentials: Credentials, work_s: float, popsize: int, seconds: list[float], paced: bool = True
    ) -> None:
        self._rng = random.Random(credentials.device)
        self._polls, self._replies = Connection(credentials, paced), Connection(credentials)
        self._info = codec.encode(info_of(credentials.device))
        self._losses = np.random.default_rng(self._rng.getrandbits(32)).random(popsize)
        self._work_s = work_s
        self._seconds = seconds
        self._poll_s = 0.0
        self._held: dict[str, asyncio.Task[None]] = {}

    async def call_in(self) -> None:
        """Poll until cancelled."""
        try:
            while True:
                poll = codec.encode(Poll(holding=tuple(self._held), wait_s=self._poll_s))
                content = await self._persist(self._polls, POLL_PATH, poll)
                delivery = _deliveries.decode(content)
                self._poll_s = delivery.wait_s
                for request in delivery.requests:
                    self._held[request.id] = asyncio.ensure_future(self._serve(request))
                if self._polls.retry_after_s and not self._held:
                    self._polls.close()
                    self._replies.close()
                    await asyncio.sleep(min(self._polls.retry_after_s, MAX_PAUSE_S))
        finally:
            for task in self._held.values():
                task.cancel()
            self._polls.close()
            self._replies.close()

    async def _serve(self, request: Request) -> None:
        try:
            reply = codec.encode(Reply(status=200, content_type=codec.CONTENT_TYPE, body=await self._answer(request)))
            began = time.monotonic()
            await self._persist(self._replies, REPLY_PATH.format(id=request.id), reply)
            if request.method == "POST":  # a report
                self._seconds.append(time.monotonic() - began)
            else:
                self._replies.close()  # a report is far
        finally:
            del self._held[request.id]

    async def _persist(self, connection: Connection, path: str, body: bytes) -> bytes:
        """Send until the coordinator responds, also with a refusal."""
        backoff = Backoff(*PAUSES_S, self._rng)
        while True:
            try:
                status, content = await connection.post(path, body)
                if status in (200, 204, 404):
                    return content
            except (OSError, EOFError):  # it is unreachable
                pass
            await asyncio.sleep(backoff.pause())

    async def _answer(self, request: Request) -> bytes:
        if request.method == "GET":
            return self._info
        if request.method == "DELETE":
            return b""
        report = codec.encode(report_on(_plans.decode(request.body), self._losses))
        await asyncio.sleep(self._rng.uniform(0, self._work_s))
        return report


async def call_in(devices: Iterable[VirtualDevice]) -> None:
    """Run all devices until cancelled; they start one after the other."""
    calling: list[asyncio.Task[None]] = []
    try:
        for device in devices:
            calling.append(asyncio.ensure_future(device.call_in()))
            await asyncio.sleep(0.001)
        await asyncio.gather(*calling)
    finally:
        for task in calling:
            task.cancel()
        await asyncio.gather(*calling, return_exceptions=True)
