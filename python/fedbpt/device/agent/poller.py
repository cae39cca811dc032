"""`Poller`: a device that calls in. It needs no open port, and works through NAT and proxies.

It polls the coordinator for requests, lets its own routes (`fedbpt.device.agent.http`) answer them, several at once,
and posts the replies. What is repeated does no harm on either side, so nothing is remembered over a restart.
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

from fedbpt.device.agent.calls import ANSWER_S, accepted, client_options, decoded, origin
from fedbpt.device.agent.http import build_app
from fedbpt.device.agent.service import AgentService
from fedbpt.errors import CoordinatorRefusedError, WireError
from fedbpt.net.server import quiet_signals
from fedbpt.net.tls import Tls, certificate_problem
from fedbpt.net.tokens import Credentials
from fedbpt.protocol import codec
from fedbpt.protocol.polling import (
    MAX_ENVELOPE_BYTES,
    MAX_HELD,
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
"""How late an answer may come before its connection counts as dead: with a poll's 4 s, it is noticed within 10 s."""

SLOW_BYTES_PER_S: Final = 8192.0
"""How slowly a reply may leave: sent so far as the system says, it may still lie in a buffer of ours or of a modem."""

PAUSES_S: Final = (0.25, 30.0)
"""Bounds of the first and the longest pause between two calls that fail."""

DROPPED: Final = frozenset({"unknown-request", "conflict", "malformed", "too-large"})
"""Refusals of a reply that no repetition will change: nobody waits for it any more, or nobody can read it."""


class Backoff:
    """Exponential pauses with full jitter: uniform in [0, min(longest, first·2ⁿ)]: a fleet does not call in step.

    (M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.)
    """

    def __init__(self, first_s: float, longest_s: float, chance: random.Random | None = None) -> None:
        self._first_s, self._longest_s = first_s, longest_s
        self._chance = chance or random.SystemRandom()
        self._failures = 0

    def pause(self, at_least_s: float = 0.0) -> float:
        """Seconds until the next attempt; where the server named a time, that much later."""
        bound = min(self._longest_s, self._first_s * 2.0 ** min(self._failures, 32))
        self._failures += 1
        return at_least_s + self._chance.uniform(0.0, bound)


class Poller:
    """Serves ``service`` to the coordinator of ``credentials``: `run` blocks, `start` and `stop` use a thread.

    Args:
        tls: for an https address, whom to believe and what to show.
        on_ready: called with the coordinator's address when the calling begins.
        tell: called with a line for people when the coordinator goes out of reach, and when it is back.

    Raises:
        ConfigError: an address that is none, or is not encrypted beyond loopback without ``allow_insecure``.
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
        self._options["headers"]["authorization"] = f"Bearer {credentials.bearer}"
        self._on_ready = on_ready
        self._tell = tell
        self._pauses_s = pauses_s
        self._held: dict[str, asyncio.Task[None]] = {}
        self._problem = ""
        self._poll_s = POLL_S[0]
        self._stop: Callable[[], None] = lambda: None
        self._thread: threading.Thread | None = None

    def run(self) -> None:
        """Call in until Ctrl-C or SIGTERM. Raises `CoordinatorRefusedError` where the coordinator does not know us."""
        with quiet_signals():
            try:
                asyncio.run(self._until_stopped())
            finally:
                if not self.service.close():
                    log.warning("the device's work did not stop in time and ends with the process")

    def start(self) -> None:
        """Call in from a thread."""
        begun = threading.Event()
        self._thread = threading.Thread(target=self._in_thread, args=(begun,), name="fedbpt-poller", daemon=True)
        self._thread.start()
        begun.wait()

    def stop(self) -> None:
        """End the thread, and the service's work."""
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
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()

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
        calling, stopping = asyncio.ensure_future(self.call_in()), asyncio.ensure_future(stopped.wait())
        try:
            await asyncio.wait([calling, stopping], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.service.stop()
            stopping.cancel()
            if not calling.done():
                calling.cancel()
            await asyncio.wait([calling])
        if not calling.cancelled():
            calling.result()  # it ends by itself only with an error

    async def call_in(self) -> None:
        """Until cancelled, for callers with a loop of their own. Raises as `run` does."""
        own = httpx.ASGITransport(build_app(self.service), raise_app_exceptions=False)
        async with (
            httpx.AsyncClient(transport=own, base_url="http://device", timeout=None) as device,
            httpx.AsyncClient(**self._options) as coordinator,
        ):
            try:
                while True:
                    delivery = await self._persist(lambda: self._poll(coordinator))
                    for request in delivery.requests if delivery else ():
                        if request.id not in self._held and len(self._held) < MAX_HELD:
                            self._held[request.id] = asyncio.create_task(self._serve(request, device, coordinator))
                    if len(self._held) >= MAX_HELD:
                        await asyncio.wait(self._held.values(), return_when=asyncio.FIRST_COMPLETED)
            finally:
                tasks = list(self._held.values())
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _poll(self, coordinator: httpx.AsyncClient) -> Delivery:
        wait_s = 0.0 if self._problem else self._poll_s  # after trouble: is it over?
        poll = Poll(holding=tuple(self._held), wait_s=wait_s)
        delivery = decoded(await self._post(coordinator, POLL_PATH, poll, wait_s), Delivery)
        self._poll_s = min(delivery.wait_s, POLL_S[1])
        return delivery

    async def _serve(self, request: Request, device: httpx.AsyncClient, coordinator: httpx.AsyncClient) -> None:
        """Let the device's routes answer, and post what they say until the coordinator has it, or wants it no more."""
        headers = {"accept": codec.CONTENT_TYPE, "content-type": codec.CONTENT_TYPE}
        try:
            answer = await device.request(request.method, request.path, content=request.body, headers=headers)
            kind = answer.headers.get("content-type", "")
            reply = Reply(status=answer.status_code, content_type=kind, body=answer.content)
            path = REPLY_PATH.format(id=request.id)
            await self._persist(lambda: self._post(coordinator, path, reply), DROPPED)
        except CoordinatorRefusedError as error:
            log.info("a reply was not wanted: %s", error)  # the next poll hears the same, and ends the process
        finally:
            del self._held[request.id]

    async def _post(self, coordinator: httpx.AsyncClient, path: str, message: Message, hold_s: float = 0.0) -> bytes:
        body = codec.encode(message)
        timeout = httpx.Timeout(ANSWER_S, read=hold_s + LATE_S + len(body) / SLOW_BYTES_PER_S)
        async with coordinator.stream("POST", path, content=body, timeout=timeout) as response:
            content = bytearray()
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > MAX_ENVELOPE_BYTES:
                    raise WireError(f"an answer is over the limit of {MAX_ENVELOPE_BYTES} bytes")
        return accepted(response, bytes(content))

    async def _persist(self, call: Callable[[], Awaitable[T]], dropped: frozenset[str] = frozenset()) -> T | None:
        """What ``call`` returns, tried again for as long as it takes; None where it is refused as one of ``dropped``.

        Raises `CoordinatorRefusedError` where the coordinator does not know the device.
        """
        backoff = Backoff(*self._pauses_s)
        while True:
            after_s = 0.0
            try:
                answer = await call()
            except CoordinatorRefusedError as error:
                if error.code == "unauthorized":
                    raise
                if error.code in dropped:
                    return None
                problem, after_s = str(error), error.retry_after_s
            except WireError as error:
                problem = f"it does not answer as a fedbpt coordinator does ({error})"
            except httpx.HTTPError as error:
                refused = certificate_problem(error) or f"cannot be reached ({str(error) or type(error).__name__})"
                problem = f"it {refused}"
            else:
                self._notice("")
                return answer
            self._notice(problem)
            await asyncio.sleep(backoff.pause(after_s))

    def _notice(self, problem: str) -> None:
        """Tell of what has changed, and only of that."""
        if problem and problem != self._problem:
            self._tell(f"{self.url}: {problem}; trying again")
        elif self._problem and not problem:
            self._tell(f"{self.url} answers again")
        self._problem = problem
