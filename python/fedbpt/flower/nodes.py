"""`Nodes`: the devices behind a Flower `Grid`, by name, and questions to them.

A SuperNode has a new id each time it is started, so ids name nobody: each node is asked who it is. Questions of all
clients go out together, and one call fetches all replies: what a round costs does not grow by a poll per device.
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
from fedbpt.flower.records import answer_of, packed
from fedbpt.plain_text import MOST_TOLD, one_line
from fedbpt.protocol.rounds import DeviceInfo

log = logging.getLogger(__name__)

T = TypeVar("T")

POLL_S: Final = 0.2
"""Between two looks for replies."""

LOOK_S: Final = 3.0
"""Between two looks for nodes that are new."""

ANSWER_S: Final = 120.0
"""How long a node may take to say who it is: a SuperNode first starts a process, and that loads the model."""

PUSHED: Final = 256
"""Most messages of one call: a SuperLink bounds what it reads at once."""

GONE: Final = frozenset(
    {
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    }
)
"""Errors of the way to a device; any other is of its work."""


class _Question:
    def __init__(self, node: int, message: Message) -> None:
        self.node, self.message = node, message
        self.reply: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

    def fail(self, error: Exception) -> None:
        if not self.reply.done():
            self.reply.set_exception(error)


class Nodes:
    """Use from one event loop at a time. ``grid`` is called from a thread, one call at a time."""

    def __init__(self, grid: Grid, *, poll_s: float = POLL_S, look_s: float = LOOK_S) -> None:
        self._grid = grid
        self._poll_s, self._look_s = poll_s, look_s
        self._thread = ThreadPoolExecutor(1, "fedbpt-flower")
        self._outbox: list[_Question] = []
        self._open: dict[str, _Question] = {}
        self._pump: asyncio.Task[None] | None = None
        self._node_of: dict[str, int] = {}
        self._fresh: dict[str, DeviceInfo] = {}  # said when the node was found, and not fetched since
        self._asked: dict[int, asyncio.Task[None]] = {}
        self.problems: dict[int, str] = {}  # nodes that could not say who they are, and why

    # --- who is there --------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Devices that were found so far, sorted."""
        return sorted(self._node_of)

    async def find(self, wanted: int, within_s: float) -> list[str]:
        """Names of the devices behind the nodes, once ``wanted`` (0: those that are there now) have said theirs."""
        loop = asyncio.get_running_loop()
        end = loop.time() + within_s
        while True:
            await self.look()
            if asking := [task for task in self._asked.values() if not task.done()]:
                await asyncio.wait(asking, timeout=max(end - loop.time(), 0.0), return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in self._asked.values() if task.done()]:
                task.result()  # a fault of ours, or of the grid
            waiting = any(not task.done() for task in self._asked.values())
            if loop.time() >= end or (len(self._node_of) >= max(wanted, 1) and (wanted or not waiting)):
                return self.names
            await asyncio.sleep(self._poll_s)

    async def look(self) -> None:
        """Ask nodes that are new who they are; the answers come later."""
        for node in await self._call(self._grid.get_node_ids):
            if node not in self._asked:
                self._asked[node] = asyncio.create_task(self._meet(node))

    def node_of(self, name: str) -> int | None:
        return self._node_of.get(name)

    def news_of(self, name: str) -> DeviceInfo | None:
        """What the device said when its node was found; once."""
        return self._fresh.pop(name, None)

    async def _meet(self, node: int) -> None:
        try:
            reply = await self.ask(node, MessageType.QUERY, None, ANSWER_S)
            info = answer_of(reply, DeviceInfo, f"node {node}")
        except DeviceUnreachableError as error:
            del self._asked[node]  # it may be back
            self.problems[node] = str(error)
            return
        except (DeviceError, WireError) as error:
            self.problems[node] = str(error)
            log.warning("a node cannot take part: %s", error)
            return
        self.problems.pop(node, None)
        before = self._node_of.get(info.name)
        self._node_of[info.name] = node
        self._fresh[info.name] = info
        if before is not None:
            log.info("%s is back as node %d", info.name, node)
            for question in [*self._open.values(), *self._outbox]:
                if question.node == before:
                    question.fail(DeviceUnreachableError(f"{info.name} was started again"))

    # --- questions -----------------------------------------------------------------------------------------------

    async def ask(self, node: int, kind: str, content: RecordDict | None, ttl_s: float, group: str = "") -> RecordDict:
        """The content of ``node``'s reply to a message of type ``kind`` (``train``, ``evaluate``, ``query``).

        Raises:
            DeviceUnreachableError: Flower cannot reach the node, or its process died. DeviceFailedError: its app did.
        """
        message = Message(packed(None) if content is None else content, node, kind, ttl=ttl_s, group_id=group)
        question = _Question(node, message)
        self._outbox.append(question)
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._carry())
        reply = await question.reply
        if not reply.has_error():
            return reply.content
        reason = one_line(reply.error.reason or f"error {reply.error.code}", MOST_TOLD)
        if reply.error.code in GONE:
            raise DeviceUnreachableError(f"Flower does not reach node {node}: {reason}")
        raise DeviceFailedError(f"node {node} failed in Flower: {reason}")

    def close(self) -> None:
        """Let go of the thread."""
        self._thread.shutdown(wait=False)

    async def _carry(self) -> None:
        """Send what is to be sent and fetch replies, until nobody waits for one."""
        loop = asyncio.get_running_loop()
        looked = loop.time()
        try:
            while self._outbox or self._open:
                await self._push()
                await self._pull()
                if loop.time() - looked >= self._look_s:
                    looked = loop.time()
                    await self.look()
                await asyncio.sleep(self._poll_s)
        except httpx.HTTPError as error:
            self._fail(DeviceUnreachableError(f"Flower's SuperLink does not answer: {error}"))
        except Exception as error:  # noqa: BLE001 - whoever waits for a reply raises it
            self._fail(error)
        finally:
            self._open.clear()
            self._outbox.clear()

    async def _push(self) -> None:
        while batch := self._outbox[:PUSHED]:
            sent = [question for question in batch if not question.reply.done()]
            messages = [question.message for question in sent]
            taken = set(await self._call(partial(self._grid.push_messages, messages)))
            del self._outbox[: len(batch)]
            for question in sent:
                if (number := question.message.metadata.message_id) in taken:
                    self._open[number] = question
                else:
                    question.fail(DeviceUnreachableError(f"Flower has no node {question.node} any more"))

    async def _pull(self) -> None:
        self._open = {number: question for number, question in self._open.items() if not question.reply.done()}
        for reply in await self._call(partial(self._grid.pull_messages, list(self._open))):
            question = self._open.pop(reply.metadata.reply_to_message_id, None)
            if question is not None and not question.reply.done():
                question.reply.set_result(reply)

    def _fail(self, error: Exception) -> None:
        for question in [*self._open.values(), *self._outbox]:
            question.fail(error)

    async def _call(self, do: Callable[[], Iterable[T]]) -> list[T]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: list(do()))
