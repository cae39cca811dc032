"""`Nodes`: the devices behind a Flower `Grid`, by name, and requests to them.

A SuperNode gets a new id at each start, so every new node is asked for its device's name. Requests of all clients are
sent together, and one call fetches all replies, so that polling does not grow with the number of devices.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, TypeVar

import httpx
from flwr.app import Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedbpt.errors import DeviceError, DeviceFailedError, DeviceUnreachableError, WireError
from fedbpt.flower.records import packed, reply_of
from fedbpt.plain_text import MOST_TOLD, one_line
from fedbpt.protocol.rounds import DeviceInfo

log = logging.getLogger(__name__)

T = TypeVar("T")

POLL_S: Final = 0.2
"""Interval between two polls for replies, in seconds."""

DISCOVER_S: Final = 3.0
"""Interval between two polls for new nodes, in seconds."""

REPLY_S: Final = 120.0
"""Time limit for a node's status, in seconds: a SuperNode first starts a process, which loads the model."""

MAX_PUSHED: Final = 256
"""Maximum number of messages per call, because a SuperLink limits the size of a call."""

TRANSPORT_ERRORS: Final = frozenset(
    {
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    }
)
"""Errors on the way to a device; all others are errors of its work."""


class _Request:
    def __init__(self, node: int, message: Message) -> None:
        self.node = node
        self.message = message
        self.reply: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

    def fail(self, error: Exception) -> None:
        if not self.reply.done():
            self.reply.set_exception(error)


class Nodes:
    """The nodes of ``grid``, which is called from a thread, one call at a time. Use from one event loop at a time.

    Args:
        grid: Flower's.
        poll_s: interval between two polls for replies, in seconds.
        discover_s: interval between two polls for new nodes, in seconds.
    """

    def __init__(self, grid: Grid, *, poll_s: float = POLL_S, discover_s: float = DISCOVER_S) -> None:
        self._grid = grid
        self._poll_s = poll_s
        self._discover_s = discover_s
        self._thread = ThreadPoolExecutor(1, "fedbpt-flower")
        self._outbox: list[_Request] = []
        self._open: dict[str, _Request] = {}
        self._pump: asyncio.Task[None] | None = None
        self._node_of: dict[str, int] = {}
        self._new_infos: dict[str, DeviceInfo] = {}  # received at discovery and not taken yet
        self._identifications: dict[int, asyncio.Task[None]] = {}
        self.problems: dict[int, str] = {}
        """Why nodes could not be identified, by node id."""

    # --- discovery -----------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Names of the devices found so far, sorted."""
        return sorted(self._node_of)

    async def find(self, wanted: int, within_s: float) -> list[str]:
        """Wait for ``wanted`` devices (0: those connected now) for up to ``within_s`` seconds. Returns their names."""
        loop = asyncio.get_running_loop()
        end = loop.time() + within_s
        while True:
            await self.discover()
            if pending := [task for task in self._identifications.values() if not task.done()]:
                await asyncio.wait(pending, timeout=max(end - loop.time(), 0.0), return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in self._identifications.values() if task.done()]:
                task.result()  # raises unexpected errors
            waiting = any(not task.done() for task in self._identifications.values())
            if loop.time() >= end or (len(self._node_of) >= max(wanted, 1) and (wanted or not waiting)):
                return self.names
            await asyncio.sleep(self._poll_s)

    async def discover(self) -> None:
        """Start identifying new nodes."""
        for node in await self._call(self._grid.get_node_ids):
            if node not in self._identifications:
                self._identifications[node] = asyncio.create_task(self._identify(node))

    def node_of(self, name: str) -> int | None:
        return self._node_of.get(name)

    def take_info(self, name: str) -> DeviceInfo | None:
        """The status received when the device was discovered; None if it was taken before."""
        return self._new_infos.pop(name, None)

    async def _identify(self, node: int) -> None:
        try:
            reply = await self.request(node, MessageType.QUERY, None, REPLY_S)
            info = reply_of(reply, DeviceInfo, f"node {node}")
        except DeviceUnreachableError as error:
            del self._identifications[node]  # retry, because it may be back
            self.problems[node] = str(error)
            return
        except (DeviceError, WireError) as error:
            self.problems[node] = str(error)
            log.warning("a node cannot take part: %s", error)
            return
        self.problems.pop(node, None)
        previous_node = self._node_of.get(info.name)
        self._node_of[info.name] = node
        self._new_infos[info.name] = info
        if previous_node is not None:
            log.info("%s is back as node %d", info.name, node)
            for request in [*self._open.values(), *self._outbox]:
                if request.node == previous_node:
                    request.fail(DeviceUnreachableError(f"{info.name} was restarted: send the request again"))

    # --- requests ------------------------------------------------------------------------------------------------

    async def request(
        self, node: int, kind: str, content: RecordDict | None, ttl_s: float, group: str = ""
    ) -> RecordDict:
        """Send a message of type ``kind`` (``train``, ``evaluate``, ``query``). Returns the content of the reply.

        Raises:
            DeviceUnreachableError: Flower cannot reach the node, or its process died.
            DeviceFailedError: the node's app failed.
        """
        message = Message(packed(None) if content is None else content, node, kind, ttl=ttl_s, group_id=group)
        request = _Request(node, message)
        self._outbox.append(request)
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._exchange())
        reply = await request.reply
        if not reply.has_error():
            return reply.content
        reason = one_line(reply.error.reason or f"error {reply.error.code}", MOST_TOLD)
        if reply.error.code in TRANSPORT_ERRORS:
            raise DeviceUnreachableError(f"Flower cannot reach node {node}: {reason}")
        raise DeviceFailedError(f"node {node} failed in Flower: {reason}")

    def close(self) -> None:
        """Release the thread."""
        self._thread.shutdown(wait=False)

    async def _exchange(self) -> None:
        """Send messages and fetch replies until none is pending."""
        loop = asyncio.get_running_loop()
        discovered_at = loop.time()
        try:
            while self._outbox or self._open:
                await self._push()
                await self._pull()
                if loop.time() - discovered_at >= self._discover_s:
                    discovered_at = loop.time()
                    await self.discover()
                await asyncio.sleep(self._poll_s)
        except httpx.HTTPError as error:
            self._fail(DeviceUnreachableError(f"Flower's SuperLink does not respond: {error}"))
        except Exception as error:  # noqa: BLE001 - raised where a reply is awaited
            self._fail(error)
        finally:
            self._open.clear()
            self._outbox.clear()

    async def _push(self) -> None:
        while batch := self._outbox[:MAX_PUSHED]:
            sent = [request for request in batch if not request.reply.done()]
            messages = [request.message for request in sent]
            accepted = set(await self._call(partial(self._grid.push_messages, messages)))
            del self._outbox[: len(batch)]
            for request in sent:
                message_id = request.message.metadata.message_id
                if message_id in accepted:
                    self._open[message_id] = request
                else:
                    gone = f"Flower no longer has node {request.node}: restart its SuperNode"
                    request.fail(DeviceUnreachableError(gone))

    async def _pull(self) -> None:
        self._open = {message_id: request for message_id, request in self._open.items() if not request.reply.done()}
        for reply in await self._call(partial(self._grid.pull_messages, list(self._open))):
            request = self._open.pop(reply.metadata.reply_to_message_id, None)
            if request is not None and not request.reply.done():
                request.reply.set_result(reply)

    def _fail(self, error: Exception) -> None:
        for request in [*self._open.values(), *self._outbox]:
            request.fail(error)

    async def _call(self, do: Callable[[], Iterable[T]]) -> list[T]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: list(do()))
