"""A TCP proxy between a coordinator and a device that causes one fault at a time."""

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
    """Forwards connections on loopback to the server at ``url``, on its own thread, until `close`.

    ``fault``: the current fault, which may be changed at any time.

    delay           every response is delayed
    stall           a response stops after its first half
    reset           the connection is reset after the first half of a response
    duplicate       each request reaches the server twice
    unacknowledged  the request reaches the server, but its response is lost
    throttle        a few KB per second
    refuse          connections are closed at once
    """

    def __init__(self, url: str, fault: Fault = "none") -> None:
        parts = urlsplit(url)
        self._server_address = parts.hostname, parts.port
        self.fault: Fault = fault
        self.broken = 0
        """Number of responses or connections affected by faults."""
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
            # the first one to end closes the connection, but a duplicate continues
            tasks = [asyncio.ensure_future(pump) for pump in pumps]
            await asyncio.wait(tasks[:2], return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        except OSError:
            self.broken += 1  # the device is unreachable from here, too
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
    """Read and discard everything."""
    while await reader.read(65536):
        pass
