"""`MailboxClient`: a device that calls in. Requests to it wait in a `Mailbox` until the device fetches them.

The mailbox is a `Transport` in which the device polls for requests and posts the replies. Retries, time-outs and errors
are those of any `TransportClient`.

A `PostOffice` and its mailboxes belong to the event loop of the coordinator's server; clients may use another one.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
import random
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, TypeAlias

from fedbpt.coordinator.clients.remote import RemoteDevice
from fedbpt.coordinator.clients.requests import POLL_S
from fedbpt.coordinator.clients.transport import IN_REACH, NoResponseError, Response
from fedbpt.errors import CoordinatorRefusedError
from fedbpt.protocol import codec
from fedbpt.protocol.polling import Delivery, Method, Reply, Request, call_s, poll_s

REPLY_S: Final = 20.0
"""How long a device that calls in may take for a reply: twice the time in which a dead connection is noticed."""

ABSENT_S: Final = 10.0
"""A device that has not polled for this long is out of reach."""

HOLD_S_PER_DEVICE: Final = 0.05
MAX_HOLD_S: Final = 30.0
"""How long a device may hold a poll of its progress: the more devices, the fewer polls of each."""

KEPT_REPLIES: Final = 16
"""Digests of a device's last replies, kept to tell a repeated reply from another one."""

STOPPING_S: Final = 2.0
"""When a device may call again while the coordinator is being stopped."""


Pacer: TypeAlias = Callable[[str], float]
"""After how many seconds a device without work is to call again; 0: its poll is held; infinite: the run has no need of
one time more than of another (`fedbpt.protocol.polling.call_s`). Called on the office's loop."""


# Together they make the id of a request unique. The device's token proves who replies.
_PROCESS: Final = secrets.token_hex(8)
_COUNTER: Final = itertools.count()


class _Exchange:
    """An open request. Belongs to the post office's loop."""

    def __init__(self, request: Request, timeout_s: float, delivered: Callable[[], None], due_s: float) -> None:
        self.request = request
        self.is_delivered = False
        self.deadline = _now() + due_s + timeout_s
        self.reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._timeout_s = timeout_s
        self._delivered = delivered

    def deliver(self) -> None:
        """Record that the device has fetched the request; the first time, its time for a reply begins."""
        if not self.is_delivered:
            self.is_delivered = True
            self.deadline = _now() + self._timeout_s
            self._delivered()

    def fail(self) -> None:
        """End without a reply."""
        if not self.reply.done():
            self.reply.set_exception(_gone(self))
            self.reply.exception()  # retrieved: perhaps nobody waits for it any more


class Mailbox:
    """The open requests to one device, in order."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._open: dict[str, _Exchange] = {}
        self._replied: OrderedDict[str, bytes] = OrderedDict()  # digest of the reply, by request
        self._news = asyncio.Event()
        self._poll: asyncio.Future[None] | None = None
        self._due = float("-inf")  # when the next poll is due
        self._closed = False

    @property
    def present(self) -> bool:
        """Whether the device polls, or has not been silent for `ABSENT_S`."""
        return not self._closed and self.silent_s < ABSENT_S

    @property
    def silent_s(self) -> float:
        """Seconds since the device's next poll is due: at the end of the last one, or when it was told to call."""
        return 0.0 if self._poll is not None else max(_now() - self._due, 0.0)

    @property
    def due_s(self) -> float:
        """Seconds until the device is to call again; 0: it polls now, or is to."""
        return 0.0 if self._poll is not None else max(self._due - _now(), 0.0)

    @property
    def is_idle(self) -> bool:
        """Whether no request is open."""
        return not self._open

    # --- the device's side ---------------------------------------------------------------------------------------

    async def poll(self, holding: tuple[str, ...], wait_s: float) -> Delivery:
        """Requests that the device does not hold yet, after at most ``wait_s`` seconds.

        Raises:
            CoordinatorRefusedError: ``superseded``, by another poll of the device; ``stopping``.
        """
        self._supersede()
        self._poll = mine = asyncio.get_running_loop().create_future()
        deadline = _now() + wait_s
        try:
            while True:
                self._check_open()
                if mine.done():
                    raise CoordinatorRefusedError(
                        f"{self.device} polls from another process: give each device its own token",
                        "superseded",
                        ABSENT_S,
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
            if self._poll is mine:  # else a newer poll, which may have ended already, says when the next one is due
                self._poll = None
                self._due = _now()

    def pause(self, seconds: float) -> None:
        """Record that the device, whose poll has just ended, was told to call again after ``seconds``."""
        self._due = _now() + seconds

    def take_reply(self, id: str, reply: Reply) -> None:
        """Take the reply to a request. The same reply may be posted again.

        Raises:
            CoordinatorRefusedError: ``unknown-request``: none is open to this device; ``conflict``: it has posted
                another reply.
        """
        digest = hashlib.sha256(codec.encode(reply)).digest()
        known = self._replied.get(id)
        if known is not None:
            if known != digest:
                raise CoordinatorRefusedError(f"request {id} has another reply already: drop this one", "conflict")
            return
        exchange = self._open.get(id)
        if exchange is None or exchange.reply.done():
            raise CoordinatorRefusedError(f"no request {id} is open: drop its reply", "unknown-request")
        exchange.reply.set_result(reply)
        self._replied[id] = digest
        if len(self._replied) > KEPT_REPLIES:
            self._replied.popitem(last=False)

    def _pending(self, held: set[str]) -> tuple[Request, ...]:
        """Requests to deliver: as many as fit into one body, at least one."""
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

    def _supersede(self) -> None:
        """End the open poll: a newer one takes its place."""
        if self._poll is not None and not self._poll.done():
            self._poll.set_result(None)

    def _check_open(self) -> None:
        if self._closed:
            raise CoordinatorRefusedError("the coordinator is shutting down: try later", "stopping", STOPPING_S)

    # --- the coordinator's side ----------------------------------------------------------------------------------

    async def exchange(self, request: Request, timeout_s: float, delivered: Callable[[], None] = lambda: None) -> Reply:
        """Put ``request`` into the mailbox and await its reply. ``delivered``: called when the device has fetched it.

        Raises:
            NoResponseError: the device does not call in, or stopped calling with the request in hand; it did not fetch
                the request within ``timeout_s`` seconds of when it is to call, or did not reply within ``timeout_s``
                seconds after that.
        """
        exchange = self._open[request.id] = _Exchange(request, timeout_s, delivered, self.due_s)
        self._news.set()
        try:
            while not exchange.reply.done():
                if not self.present:
                    raise _gone(exchange)
                left = exchange.deadline - _now()
                if left <= 0:
                    raise NoResponseError(f"does not respond: {IN_REACH}")
                # The device is present for at least this long: most exchanges wake up once.
                await asyncio.wait([exchange.reply], timeout=min(left, self.due_s + ABSENT_S - self.silent_s))
            return exchange.reply.result()
        finally:
            del self._open[request.id]

    def close(self) -> None:
        """Refuse polls as ``stopping``, and fail the open requests."""
        self._closed = True
        self._news.set()
        for exchange in self._open.values():
            exchange.fail()


def _gone(exchange: _Exchange) -> NoResponseError:
    what = "stopped calling in" if exchange.is_delivered else "does not call in"
    return NoResponseError(f"{what}: {IN_REACH}", begun=exchange.is_delivered)


class PostOffice:
    """The mailboxes by device name; each is made when it is first used."""

    def __init__(self) -> None:
        self._boxes: dict[str, Mailbox] = {}
        self._pacers: dict[str, Pacer] = {}
        self._chance = random.Random()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def open(self) -> None:
        """Call once, from the event loop that the mailboxes belong to."""
        self._loop = asyncio.get_running_loop()

    def box(self, device: str) -> Mailbox:
        """The mailbox of ``device``. Call on the office's loop."""
        found = self._boxes.get(device)
        if found is None:
            found = self._boxes[device] = Mailbox(device)
            if self._closed:
                found.close()
        return found

    @property
    def n_devices(self) -> int:
        """Number of devices that have a mailbox. From any thread."""
        return len(self._boxes)

    @property
    def poll_s(self) -> float:
        """How long a device's next poll is held, seconds."""
        return poll_s(self.n_devices)

    def pace(self, run: str, pacer: Pacer | None) -> None:
        """Have ``pacer`` say when the devices of ``run`` are to call again; None: nothing does. From any thread."""
        pacers = {name: each for name, each in self._pacers.items() if name != run}
        self._pacers = pacers if pacer is None else {**pacers, run: pacer}

    def pause_s(self, device: str) -> float:
        """After how many seconds ``device``, which has no work, is to call again; 0: its poll is to be held."""
        pause_s = min((pacer(device) for pacer in self._pacers.values()), default=math.inf)
        if math.isinf(pause_s):
            return call_s(self.n_devices) * self._chance.uniform(0.75, 1.25)
        return pause_s

    def present(self) -> list[str]:
        """Names of the devices that call in now, sorted. From any thread."""
        return sorted(name for name, box in self._boxes.copy().items() if box.present)

    def silent_s(self, device: str) -> float:
        """`Mailbox.silent_s` of ``device``; infinite if it never called. From any thread."""
        box = self._boxes.get(device)
        return float("inf") if box is None else box.silent_s

    def due_s(self, device: str) -> float:
        """`Mailbox.due_s` of ``device``; 0 if it never called. From any thread."""
        box = self._boxes.get(device)
        return 0.0 if box is None else box.due_s

    def close(self) -> None:
        """End all polls. Call on the office's loop."""
        self._closed = True
        for box in self._boxes.values():
            box.close()

    async def exchange(
        self, device: str, request: Request, timeout_s: float, delivered: Callable[[], None] = lambda: None
    ) -> Reply:
        """`Mailbox.exchange`, from any event loop; ``delivered`` is called on the office's loop."""
        loop = self._loop
        if loop is None or self._closed:
            raise NoResponseError("cannot be reached: the coordinator's server does not run")

        async def there() -> Reply:
            return await self.box(device).exchange(request, timeout_s, delivered)

        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(there(), loop))

    def client(self, device: str) -> MailboxClient:
        """A client of ``device``, for any event loop. The more mailboxes there are, the longer its polls are held."""
        return MailboxClient(device, self, min(max(POLL_S, len(self._boxes) * HOLD_S_PER_DEVICE), MAX_HOLD_S))


class MailboxClient(RemoteDevice):
    """Reaches the device that calls in as ``device``. See `DeviceClient` for the methods."""

    def __init__(self, device: str, office: PostOffice, poll_s: float = POLL_S) -> None:
        super().__init__(MailboxTransport(device, office), device, response_s=REPLY_S, poll_s=poll_s)
        self.office = office

    @property
    def due_s(self) -> float:
        """See `DeviceClient.due_s`."""
        return self.office.due_s(self.name)


class MailboxTransport:
    """Requests through the mailbox of ``device``. See `Transport`."""

    where = "calls in"
    holds_plans = True
    sends_short = True

    def __init__(self, device: str, office: PostOffice) -> None:
        self._device = device
        self._office = office

    async def send(
        self,
        method: Method,
        path: str,
        body: bytes | None,
        timeout_s: float,
        delivered: Callable[[], None] = lambda: None,
    ) -> Response:
        request = Request(id=f"{_PROCESS}{next(_COUNTER):016x}", method=method, path=path, body=body or b"")
        reply = await self._office.exchange(self._device, request, timeout_s, delivered)
        return Response(reply.status, reply.content_type, reply.body)

    async def responds(self, timeout_s: float) -> bool:
        return self._office.silent_s(self._device) < timeout_s

    async def aclose(self) -> None:
        """Nothing to close: the connections are the device's."""

    def twin(self) -> MailboxTransport:
        return self


def _now() -> float:
    return time.monotonic()
