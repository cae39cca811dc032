"""A TCP proxy between a coordinator and a device that breaks what passes it, in one way at a time."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, Final, Literal, TypeAlias
from urllib.parse import urlsplit

Fault: TypeAlias = Literal["none", "delay", "stall", "reset", "duplicate", "unacknowledged", "throttle", "refuse"]
FAULTS: Final[tuple[Fault, ...]] = ("delay", "stall", "reset", "duplicate", "unacknowledged", "throttle", "refuse")

DELAY_S: Final = 0.3
THROTTLED_BYTES_PER_S: Final = 4000


class FaultProxy:
    """Listens on loopback for the server at ``url``; runs on a thread of its own until `close`.

    ``fault``: what is done to connections as long as it is set; it may be changed at any time.

    delay           every answer comes late
    stall           the answer's first half comes, then nothing more
    reset           the answer's first half comes, then the connection is reset
    duplicate       each request reaches the device twice
    unacknowledged  the request reaches the device, its answer never arrives
    throttle        a few KB a second
    refuse          connections are closed at once
    """

    def __init__(self, url: str, fault: Fault = "none") -> None:
        parts = urlsplit(url)
        self._server_address = parts.hostname, parts.port
        self.fault: Fault = fault
        self.broken = 0
        """Answers, or connections, that were interfered with."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def close(self) -> None:
        self._server.close()
        self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(self._loop)])
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(5)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.fault == "refuse":
            self.broken += 1
            writer.transport.abort()
            return
        upstream = []
        try:
            for _ in range(2 if self.fault == "duplicate" else 1):
                upstream.append(await asyncio.open_connection(*self._server_address))
            pumps = [
                self._requests(reader, [to for _, to in upstream]),
                self._answers(upstream[0][0], writer),
                *(drain(twin) for twin, _ in upstream[1:]),
            ]
            # the first that ends ends the connection, but a twin that hears nothing more
            tasks = [asyncio.ensure_future(pump) for pump in pumps]
            await asyncio.wait(tasks[:2], return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        except OSError:
            self.broken += 1  # the device is away: so it looks from here, too
        finally:
            for end in [writer, *(to for _, to in upstream)]:
                end.transport.abort()

    async def _requests(self, reader: asyncio.StreamReader, writers: list[asyncio.StreamWriter]) -> None:
        while data := await reader.read(65536):
            if len(writers) > 1:
                self.broken += 1
            for writer in writers:
                writer.write(data)
                await writer.drain()

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            fault = self.fault
            if fault != "none":
                self.broken += 1
            if fault == "delay":
                await asyncio.sleep(DELAY_S)
            elif fault == "throttle":
                await asyncio.sleep(len(data) / THROTTLED_BYTES_PER_S)
            elif fault == "unacknowledged":
                return
            elif fault in ("stall", "reset"):
                writer.write(data[: len(data) // 2])
                await writer.drain()
                if fault == "reset":
                    return
                await asyncio.sleep(3600.0)
            writer.write(data)
            await writer.drain()


async def drain(reader: asyncio.StreamReader) -> None:
    """Read what nobody wants."""
    while await reader.read(65536):
        pass
