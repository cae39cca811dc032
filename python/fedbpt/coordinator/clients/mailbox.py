"""`MailboxClient`: reaches a device that calls in. Its requests lie in a `Mailbox` until the device fetches them.

The mailbox is a `Transport` the other way round: each request is put into the box, and its reply awaited. Repetition,
time-outs and errors are those of any `RemoteDevice`.

A `PostOffice` and its boxes belong to the event loop of the coordinator's server. Clients may live in another one.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from fedbpt.coordinator.clients.remote import POLL_S, RemoteDevice
from fedbpt.coordinator.clients.transport import IN_REACH, NoReplyError, Response
from fedbpt.errors import CoordinatorRefusedError
from fedbpt.protocol import codec
from fedbpt.protocol.polling import Delivery, Method, Reply, Request, poll_s

ANSWER_S: Final = 20.0
"""How long a device that calls in may take for a reply: twice as long as to notice that a connection went silent."""

ABSENT_S: Final = 10.0
"""A device that has not polled for so long is out of reach."""

HOLD_S_PER_DEVICE: Final = 0.05
LONGEST_HOLD_S: Final = 30.0
"""How long a device may hold a request: of many, each is asked less often how far its work is."""

KEPT_ANSWERS: Final = 16
"""Digests of a device's last replies, kept to tell a repeated reply from a forged one."""

STOPPING_S: Final = 2.0
"""When to call again a coordinator that is being stopped."""


# With these a request's id is unique. What proves who replies is the device's token.
_PROCESS: Final = secrets.token_hex(8)
_COUNTER: Final = itertools.count()


class _Exchange:
    """A request on its way. Belongs to the post office's loop."""

    def __init__(self, request: Request, timeout_s: float, fetched: Callable[[], None]) -> None:
        self.request = request
        self.delivered = False
        self.deadline = _now() + timeout_s
        self.reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._timeout_s = timeout_s
        self._fetched = fetched

    def deliver(self) -> None:
        """The device has the request in hand; the first time, its own time for a reply begins."""
        if not self.delivered:
            self.delivered, self.deadline = True, _now() + self._timeout_s
            self._fetched()

    def end(self) -> None:
        """There will be no reply."""
        if not self.reply.done():
            self.reply.set_exception(_gone(self))
            self.reply.exception()  # perhaps nobody waits for it any more


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
        digest = hashlib.sha256(codec.encode(reply)).digest()
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
        left = codec.MAX_BODY_BYTES
        for exchange in self._open.values():
            if exchange.request.id in held or exchange.reply.done():
                continue
            left -= len(exchange.request.body)
            if chosen and left < 0:
                break
            exchange.deliver()
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

    async def exchange(self, request: Request, timeout_s: float, fetched: Callable[[], None] = lambda: None) -> Reply:
        """Lay ``request`` into the box and await its reply. ``fetched``: called when the device has it.

        Raises `NoReplyError` where the device does not call in, or ceased to with the request in hand; where it does
        not fetch it within ``timeout_s`` seconds, or then does not reply within as many.
        """
        exchange = self._open[request.id] = _Exchange(request, timeout_s, fetched)
        self._news.set()
        try:
            while not exchange.reply.done():
                if not self.present:
                    raise _gone(exchange)
                left = exchange.deadline - _now()
                if left <= 0:
                    raise NoReplyError(f"does not answer: {IN_REACH}")
                # For as long as the device is sure to be present: most exchanges wake up once.
                await asyncio.wait([exchange.reply], timeout=min(left, ABSENT_S - self.silent_s))
            return exchange.reply.result()
        finally:
            del self._open[request.id]

    def close(self) -> None:
        """From now on the device is told to call again later, and is out of reach."""
        self._closed = True
        self._news.set()
        for exchange in self._open.values():
            exchange.end()


def _gone(exchange: _Exchange) -> NoReplyError:
    what = "ceased to call in" if exchange.delivered else "does not call in"
    return NoReplyError(f"{what}: {IN_REACH}", begun=exchange.delivered)


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

    @property
    def poll_s(self) -> float:
        """How long a device is to have its next poll held open."""
        return poll_s(len(self._boxes))

    def present(self) -> list[str]:
        """Names of the devices that call in now, sorted. From any thread."""
        return sorted(name for name, box in self._boxes.copy().items() if box.present)

    def silent_s(self, device: str) -> float:
        """`Mailbox.silent_s` of ``device``; infinite where it never called. From any thread."""
        box = self._boxes.get(device)
        return float("inf") if box is None else box.silent_s

    def close(self) -> None:
        """Let every poll go. On the office's loop."""
        self._closed = True
        for box in self._boxes.values():
            box.close()

    async def exchange(
        self, device: str, request: Request, timeout_s: float, fetched: Callable[[], None] = lambda: None
    ) -> Reply:
        """`Mailbox.exchange`, from any event loop; ``fetched`` is called on that of the office."""
        loop = self._loop
        if loop is None or self._closed:
            raise NoReplyError("cannot be reached: the coordinator's server does not run")

        async def there() -> Reply:
            return await self.box(device).exchange(request, timeout_s, fetched)

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(there(), loop))

    def client(self, device: str) -> MailboxClient:
        """A client of ``device``, to use from any event loop; one of many asks less often how far its work is."""
        return MailboxClient(device, self, min(max(POLL_S, len(self._boxes) * HOLD_S_PER_DEVICE), LONGEST_HOLD_S))


class MailboxClient(RemoteDevice):
    """Reaches the device that calls in as ``device``. See `DeviceClient` for the methods."""

    def __init__(self, device: str, office: PostOffice, poll_s: float = POLL_S) -> None:
        super().__init__(MailboxTransport(device, office), device, answer_s=ANSWER_S, poll_s=poll_s)


class MailboxTransport:
    """Requests by the mailbox of ``device``. See `Transport`."""

    where = "calls in"
    holds_plans = True

    def __init__(self, device: str, office: PostOffice) -> None:
        self._device, self._office = device, office

    async def send(
        self, method: Method, path: str, body: bytes | None, read_s: float, taken: Callable[[], None] = lambda: None
    ) -> Response:
        request = Request(id=f"{_PROCESS}{next(_COUNTER):016x}", method=method, path=path, body=body or b"")
        reply = await self._office.exchange(self._device, request, read_s, taken)
        return Response(reply.status, reply.content_type, reply.body)

    async def answers(self, timeout_s: float) -> bool:
        return self._office.silent_s(self._device) < timeout_s

    async def aclose(self) -> None:
        """The connections are the device's."""

    def twin(self) -> MailboxTransport:
        return self


def _now() -> float:
    return time.monotonic()
