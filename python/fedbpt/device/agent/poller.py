"""`Poller`: serves a device without an open port, also behind NAT and proxies.

It polls the coordinator for requests, has the device's own routes (`fedbpt.device.agent.http`) handle them, several at
once, and posts the replies. Repetitions are harmless on both sides, so no state survives a restart.
While it has no work, it calls when the coordinator says (`PACED_HEADER`); while it works, its polls are held.
"""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import threading
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import httpx

from fedbpt.device.agent.calls import RESPONSE_S, accepted, client_options, decoded, origin
from fedbpt.device.agent.http import build_app
from fedbpt.device.agent.service import AgentService
from fedbpt.errors import CoordinatorRefusedError, WireError
from fedbpt.net.bodies import retry_after
from fedbpt.net.server import quiet_signals
from fedbpt.net.tls import Tls, certificate_problem
from fedbpt.net.tokens import Credentials
from fedbpt.protocol import codec
from fedbpt.protocol.polling import (
    MAX_ENVELOPE_BYTES,
    MAX_HELD,
    MAX_PAUSE_S,
    PACED_HEADER,
    POLL_PATH,
    POLL_S,
    REPLY_PATH,
    Delivery,
    Poll,
    Reply,
    Request,
)
from fedbpt.protocol.specs import Message

T = TypeVar("T")

log = logging.getLogger(__name__)

LATE_S: Final = 5.5
"""Tolerated delay of a response, seconds; after it the connection counts as dead: with a poll's 4 s, within 10 s."""

SLOW_BYTES_PER_S: Final = 8192.0
"""Slowest tolerated upload: bytes that the system reports as sent may still be in a buffer here or in a modem."""

PAUSES_S: Final = (0.25, 30.0)
"""Upper bounds of the first and of the longest pause between failing calls, seconds."""

DROPPED: Final = frozenset({"unknown-request", "conflict", "malformed", "too-large"})
"""Codes with which a reply is refused for good: nobody waits for it any more, or it cannot be decoded."""


class Backoff:
    """Exponential backoff with full jitter, uniform in [0, min(longest, first·2ⁿ)], which keeps a fleet out of step.

    (M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.)
    """

    def __init__(self, first_s: float, longest_s: float, chance: random.Random | None = None) -> None:
        self._first_s, self._longest_s = first_s, longest_s
        self._chance = chance or random.SystemRandom()
        self._failures = 0

    def pause(self, at_least_s: float = 0.0) -> float:
        """Seconds until the next attempt: ``at_least_s``, for which the server asked, and a random time."""
        bound = min(self._longest_s, self._first_s * 2.0 ** min(self._failures, 32))
        self._failures += 1
        return at_least_s + self._chance.uniform(0.0, bound)


class Poller:
    """Serves ``service`` to the coordinator in ``credentials``: `run` blocks, `start` and `stop` use a thread.

    Args:
        tls: trusted certificates and the client certificate, for an https address.
        on_ready: called with the coordinator's address before the first poll.
        tell: called with a line for people when the coordinator becomes unreachable, and when it is back.
        pauses_s: see `PAUSES_S`.

    Raises:
        ConfigError: the address is invalid, or is unencrypted and beyond loopback without ``allow_insecure``.
    """

    def __init__(
        self,
        service: AgentService,
        credentials: Credentials,
        *,
        tls: Tls | None = None,
        allow_insecure: bool = False,
        on_ready: Callable[[str], None] = lambda _url: None,
        tell: Callable[[str], None] = log.warning,
        pauses_s: tuple[float, float] = PAUSES_S,
    ) -> None:
        self.service = service
        self.url = origin(credentials.coordinator, allow_insecure)
        self._options = client_options(self.url, tls or Tls())
        self._options["headers"] |= {"authorization": f"Bearer {credentials.bearer}"}
        self._on_ready = on_ready
        self._tell = tell
        self._pauses_s = pauses_s
        self._held: dict[str, asyncio.Task[None]] = {}
        self._problem = ""
        self._poll_s = POLL_S[0]
        self._stop: Callable[[], None] = lambda: None
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Poll until Ctrl-C or SIGTERM. Raises `CoordinatorRefusedError` if the device is not enrolled."""
        with quiet_signals():
            try:
                asyncio.run(self._until_stopped())
            finally:
                if not self.service.close():
                    log.warning("the device's work did not stop in time and will end with the process")

    def start(self) -> None:
        """Poll from a background thread."""
        begun = threading.Event()
        self._thread = threading.Thread(target=self._in_thread, args=(begun,), name="fedbpt-poller", daemon=True)
        self._thread.start()
        begun.wait()

    def stop(self) -> None:
        """Stop polling and the service's work."""
        self._stop()
        if self._thread is not None:
            self._thread.join(10)
            self._thread = None
        self.service.close()

    def __enter__(self) -> Poller:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- inside --------------------------------------------------------------------------------------------------

    def _in_thread(self, begun: threading.Event) -> None:
        try:
            asyncio.run(self._until_stopped(begun))
        except CoordinatorRefusedError as error:
            self._tell(str(error))
        finally:
            begun.set()

    async def _until_stopped(self, begun: threading.Event | None = None) -> None:
        loop = asyncio.get_running_loop()
        stopped = asyncio.Event()

        def stop() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(stopped.set)

        self._stop = stop
        if threading.current_thread() is threading.main_thread():
            for which in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(which, stopped.set)
        self._on_ready(self.url)
        if begun is not None:
            begun.set()
        calling = asyncio.ensure_future(self.call_in())
        stopping = asyncio.ensure_future(stopped.wait())
        try:
            await asyncio.wait([calling, stopping], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.service.stop()
            stopping.cancel()
            if not calling.done():
                calling.cancel()
            await asyncio.wait([calling])
        if not calling.cancelled():
            calling.result()  # it only ends by itself with an error

    async def call_in(self) -> None:
        """Poll until cancelled, in the caller's event loop. Raises as `run` does."""
        own = httpx.ASGITransport(build_app(self.service), raise_app_exceptions=False)
        async with (
            httpx.AsyncClient(transport=own, base_url="http://device", timeout=None) as device,
            httpx.AsyncClient(**self._options) as coordinator,
        ):
            try:
                while True:
                    delivery, pause_s = await self._persist(lambda: self._poll(coordinator)) or (Delivery(), 0.0)
                    for request in delivery.requests:
                        if request.id not in self._held and len(self._held) < MAX_HELD:
                            self._held[request.id] = asyncio.create_task(self._serve(request, device, coordinator))
                    if len(self._held) >= MAX_HELD:
                        await asyncio.wait(self._held.values(), return_when=asyncio.FIRST_COMPLETED)
                    if pause_s:
                        await asyncio.sleep(min(pause_s, MAX_PAUSE_S))
            finally:
                tasks = list(self._held.values())
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _poll(self, coordinator: httpx.AsyncClient) -> tuple[Delivery, float]:
        """What the device is to do, and after how many seconds it is to call again."""
        wait_s = 0.0 if self._problem else self._poll_s  # after a failure, ask at once whether it is over
        poll = Poll(holding=tuple(self._held), wait_s=wait_s)
        content, pause_s = await self._post(coordinator, POLL_PATH, poll, wait_s, self._pace_headers())
        delivery = decoded(content, Delivery)
        self._poll_s = min(delivery.wait_s, POLL_S[1])
        return delivery, 0.0 if delivery.requests else pause_s

    def _pace_headers(self) -> dict[str, str]:
        """Say that the device may be told when to call: not while it works, as its report is about to be fetched."""
        return {} if self.service.busy else {PACED_HEADER: "1"}

    async def _serve(self, request: Request, device: httpx.AsyncClient, coordinator: httpx.AsyncClient) -> None:
        """Have the device's routes handle ``request``, and post the reply until the coordinator takes or drops it."""
        headers = {"accept": codec.CONTENT_TYPE, "content-type": codec.CONTENT_TYPE}
        try:
            response = await device.request(request.method, request.path, content=request.body, headers=headers)
            content_type = response.headers.get("content-type", "")
            reply = Reply(status=response.status_code, content_type=content_type, body=response.content)
            path = REPLY_PATH.format(id=request.id)
            await self._persist(lambda: self._post(coordinator, path, reply), DROPPED)
        except CoordinatorRefusedError as error:
            log.info("a reply was refused: %s", error)  # the next poll is refused too, which ends the process
        finally:
            del self._held[request.id]

    async def _post(
        self,
        coordinator: httpx.AsyncClient,
        path: str,
        message: Message,
        hold_s: float = 0.0,
        headers: dict[str, str] | None = None,
    ) -> tuple[bytes, float]:
        """The content of the response, and its ``Retry-After`` in seconds."""
        body = codec.encode(message)
        timeout = httpx.Timeout(RESPONSE_S, read=hold_s + LATE_S + len(body) / SLOW_BYTES_PER_S)
        async with coordinator.stream("POST", path, content=body, headers=headers, timeout=timeout) as response:
            content = bytearray()
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > MAX_ENVELOPE_BYTES:
                    raise WireError(
                        f"the response exceeds the limit of {MAX_ENVELOPE_BYTES} bytes", limit=MAX_ENVELOPE_BYTES
                    )
        return accepted(response, bytes(content)), retry_after(response.headers)

    async def _persist(self, call: Callable[[], Awaitable[T]], dropped: frozenset[str] = frozenset()) -> T | None:
        """Call until it succeeds and return its result; None if it is refused with a code in ``dropped``.

        Raises `CoordinatorRefusedError` if the device is not enrolled.
        """
        backoff = Backoff(*self._pauses_s)
        while True:
            after_s = 0.0
            try:
                result = await call()
            except CoordinatorRefusedError as error:
                if error.code == "unauthorized":
                    raise
                if error.code in dropped:
                    return None
                problem = str(error)
                after_s = error.retry_after_s
            except WireError as error:
                problem = f"the response is not from a fedbpt coordinator ({error})"
            except httpx.HTTPError as error:
                reason = certificate_problem(error) or f"cannot be reached ({str(error) or type(error).__name__})"
                problem = f"it {reason}"
            else:
                self._notice("")
                return result
            self._notice(problem)
            await asyncio.sleep(backoff.pause(after_s))

    def _notice(self, problem: str) -> None:
        """Tell people about a change of the problem; "" means that there is none any more."""
        if problem and problem != self._problem:
            self._tell(f"{self.url}: {problem}; trying again")
        elif self._problem and not problem:
            self._tell(f"{self.url} responds again")
        self._problem = problem
