"""`MailboxClient`: reaches a device that calls in. Its requests lie in a `Mailbox` until the device fetches them.

The mailbox is an HTTP channel the other way round: `HttpClient` over a transport that puts each request into the box
and awaits its reply. Repetition, time-outs and errors are therefore those of a device that is called.

A `PostOffice` and its boxes belong to the event loop of the coordinator's server. Clients may live in another one.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import secrets
import time
from collections import OrderedDict
from typing import Final

import httpx
import msgspec

from fedbpt import wire
from fedbpt.clients.http import POLL_S, HttpClient
from fedbpt.envelopes import Delivery, Reply, Request
from fedbpt.errors import CoordinatorRefusedError

ABSENT_S: Final = 10.0
"""A device that has not polled for so long is out of reach."""

POLL_S_PER_DEVICE: Final = 0.05
LONGEST_POLL_S: Final = 30.0

KEPT_ANSWERS: Final = 256
"""Digests of a device's last replies, kept to tell a repeated reply from a forged one."""

STOPPING_S: Final = 2.0
"""When to call again a coordinator that is being stopped."""


# With these a request's id is unique. What proves who replies is the device's token.
_PROCESS: Final = secrets.token_hex(8)
_COUNTER: Final = itertools.count()


class _Exchange:
    """A request on its way. Belongs to the post office's loop."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.delivered = False
        self.reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()


class Mailbox:
    """The requests for one device that are not answered yet, in order."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._open: dict[str, _Exchange] = {}
        self._answered: OrderedDict[str, bytes] = OrderedDict()  # id: digest of the reply
        self._news = asyncio.Event()
        self._poll: asyncio.Future[None] | None = None
        self._seen = float("-inf")
        self._closed = False

    @property
    def present(self) -> bool:
        """Whether the device polls, or did so a moment ago."""
        return not self._closed and (self._poll is not None or _now() - self._seen < ABSENT_S)

    @property
    def silent_s(self) -> float:
        """Seconds since the device last held a poll open; 0: it does."""
        return 0.0 if self._poll is not None else _now() - self._seen

    # --- the device's side ---------------------------------------------------------------------------------------

    async def poll(self, holding: tuple[str, ...], wait_s: float) -> Delivery:
        """Requests that the device does not hold yet, after at most ``wait_s`` seconds.

        Refused as ``superseded`` when the device polls anew, as ``stopping`` at the end.
        """
        self._let_go()
        self._poll = mine = asyncio.get_running_loop().create_future()
        deadline = _now() + wait_s
        try:
            while True:
                self._check_open()
                if mine.done():
                    raise CoordinatorRefusedError(
                        f"{self.device} polls from elsewhere: two processes use its token", "superseded", ABSENT_S
                    )
                requests = self._pending(set(holding))
                if requests or _now() >= deadline:
                    return Delivery(requests=requests)
                self._news.clear()
                news = asyncio.ensure_future(self._news.wait())
                try:
                    await asyncio.wait([news, mine], timeout=deadline - _now(), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    news.cancel()
        finally:
            if self._poll is mine:
                self._poll = None
            self._seen = _now()

    def answer(self, id: str, reply: Reply) -> None:
        """The reply to a request. The same reply again is accepted again.

        Refused as ``unknown-request`` where this device was not asked, or nobody waits any more; as ``conflict`` where
        it has answered otherwise.
        """
        digest = hashlib.sha256(wire.encode(reply)).digest()
        known = self._answered.get(id)
        if known is not None:
            if known != digest:
                raise CoordinatorRefusedError(f"request {id} was answered otherwise before", "conflict")
            return
        exchange = self._open.get(id)
        if exchange is None or exchange.reply.done():
            raise CoordinatorRefusedError(f"no request {id} is open: drop its reply", "unknown-request")
        exchange.reply.set_result(reply)
        self._answered[id] = digest
        if len(self._answered) > KEPT_ANSWERS:
            self._answered.popitem(last=False)

    def _pending(self, held: set[str]) -> tuple[Request, ...]:
        """As many as one body may hold, the first in any case."""
        chosen: list[Request] = []
        left = wire.MAX_BODY_BYTES
        for exchange in self._open.values():
            if exchange.request.id in held or exchange.reply.done():
                continue
            left -= len(exchange.request.body)
            if chosen and left < 0:
                break
            exchange.delivered = True
            chosen.append(exchange.request)
        return tuple(chosen)

    def _let_go(self) -> None:
        """A newer poll takes the place of an older one."""
        if self._poll is not None and not self._poll.done():
            self._poll.set_result(None)

    def _check_open(self) -> None:
        if self._closed:
            raise CoordinatorRefusedError("the coordinator is being stopped", "stopping", STOPPING_S)

    # --- the coordinator's side ----------------------------------------------------------------------------------

    async def exchange(self, request: Request, timeout_s: float) -> Reply:
        """Lay ``request`` into the box and await its reply.

        Raises httpx.ConnectError where the device does not call in, httpx.ReadError where it ceased to with the
        request in hand, httpx.ReadTimeout after ``timeout_s`` seconds.
        """
        deadline = _now() + timeout_s
        exchange = self._open[request.id] = _Exchange(request)
        self._news.set()
        try:
            while not exchange.reply.done():
                if not self.present:
                    gone = httpx.ReadError if exchange.delivered else httpx.ConnectError
                    raise gone("the device does not call in")
                if _now() >= deadline:
                    raise httpx.ReadTimeout("the device does not answer")
                # Not longer than a moment: whether the device is present depends on the time.
                await asyncio.wait([exchange.reply], timeout=min(deadline - _now(), 0.5))
            return exchange.reply.result()
        finally:
            del self._open[request.id]

    def close(self) -> None:
        """From now on the device is told to call again later, and is out of reach."""
        self._closed = True
        self._news.set()


class PostOffice:
    """The mailboxes by device name; each is made when it is first wanted."""

    def __init__(self) -> None:
        self._boxes: dict[str, Mailbox] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def open(self) -> None:
        """Call once from the event loop that the boxes are to belong to."""
        self._loop = asyncio.get_running_loop()

    def box(self, device: str) -> Mailbox:
        """The mailbox of ``device``. On the office's loop."""
        found = self._boxes.get(device)
        if found is None:
            found = self._boxes[device] = Mailbox(device)
            if self._closed:
                found.close()
        return found

    def present(self) -> list[str]:
        """Names of the devices that call in now, sorted. From any thread."""
        return sorted(name for name, box in list(self._boxes.items()) if box.present)

    def silent_s(self, device: str) -> float:
        """`Mailbox.silent_s` of ``device``; infinite where it never called. From any thread."""
        box = self._boxes.get(device)
        return float("inf") if box is None else box.silent_s

    def close(self) -> None:
        """Let every poll go. On the office's loop."""
        self._closed = True
        for box in self._boxes.values():
            box.close()

    async def exchange(self, device: str, request: Request, timeout_s: float) -> Reply:
        """`Mailbox.exchange`, from any event loop."""
        loop = self._loop
        if loop is None or self._closed:
            raise httpx.ConnectError("the coordinator's server does not run")

        async def there() -> Reply:
            return await self.box(device).exchange(request, timeout_s)

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(there(), loop))

    def client(self, device: str) -> MailboxClient:
        """A client of ``device``, to use from any event loop; one of many asks less often how far its work is."""
        return MailboxClient(device, self, min(max(POLL_S, len(self._boxes) * POLL_S_PER_DEVICE), LONGEST_POLL_S))


class MailboxTransport(httpx.AsyncBaseTransport):
    """httpx's way to a device: through its mailbox."""

    def __init__(self, device: str, office: PostOffice) -> None:
        self._device, self._office = device, office

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        envelope = msgspec.convert(
            {
                "id": f"{_PROCESS}{next(_COUNTER):016x}",
                "method": request.method,
                "path": request.url.raw_path.decode("ascii"),
                "body": await request.aread(),
            },
            Request,
        )
        reply = await self._office.exchange(self._device, envelope, request.extensions["timeout"]["read"])
        return httpx.Response(
            reply.status, headers={"content-type": reply.content_type}, stream=httpx.ByteStream(reply.body)
        )


class MailboxClient(HttpClient):
    """Reaches the device that calls in as ``device``. See `DeviceClient` for the methods."""

    def __init__(self, device: str, office: PostOffice, poll_s: float = POLL_S) -> None:
        super().__init__("http://mailbox", device, transport=MailboxTransport(device, office), poll_s=poll_s)
        self.where = "calls in"
        self._office = office

    def twin(self) -> MailboxClient:
        return MailboxClient(self.name, self._office)

    async def answers(self, timeout_s: float) -> bool:
        return self._office.silent_s(self.name) < timeout_s

    def __repr__(self) -> str:
        return f"MailboxClient({self.name!r})"


def _now() -> float:
    return time.monotonic()
