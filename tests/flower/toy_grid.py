"""A Flower `Grid` of nodes in this process: real messages and ClientApps, no SuperLink.

As a SuperNode, a node processes one message at a time, and keeps its context until it is stopped.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedbpt.device.state import DeviceState
from fedbpt.flower import client_app
from tests.support.fake_device import FakeDevice

_NUMBERS = itertools.count(1)


class Node:
    """A SuperNode with an app and a new id."""

    def __init__(self, app: ClientApp, **config: Any) -> None:
        self.id = next(_NUMBERS)
        self.app = app
        self.online = True
        self.context = Context(self.id, self.id, config, RecordDict(), {})
        self.handled: list[str] = []  # types of the messages
        self._inbox: queue.SimpleQueue[tuple[Message, Callable[[Message], None]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def put(self, message: Message, answered: Callable[[Message], None]) -> None:
        self._inbox.put((message, answered))

    def stop(self) -> None:
        """Stop as by SIGKILL, without any further reply."""
        self.online = False
        self._inbox.put(None)

    def _work(self) -> None:
        while self.online and (given := self._inbox.get()) is not None:
            message, answered = given
            self.handled.append(message.metadata.message_type)
            try:
                reply = self.app(message, self.context)
            except Exception as error:  # noqa: BLE001 - as a SuperNode does
                reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)), reply_to=message)
            if self.online:
                answered(reply)


class ToyGrid(Grid):
    """``failing``: raised by the next call, as if the SuperLink were down. ``pushed``: messages per call."""

    def __init__(self, *nodes: Node) -> None:
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        self.nodes = {node.id: node for node in nodes}
        self.failing: Exception | None = None
        self.pushed: list[int] = []
        self._replies: dict[str, Message] = {}
        self._asked: dict[str, Message] = {}

    def add(self, node: Node) -> None:
        self.nodes[node.id] = node

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        self._check()
        return [node.id for node in self.nodes.values() if node.online]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self._check()
        numbers = []
        for message in messages:
            if message.metadata.dst_node_id in self.nodes:
                number = message.metadata.__dict__["_message_id"] = f"m{next(_NUMBERS)}"
                self._asked[number] = message
                node = self.nodes[message.metadata.dst_node_id]
                node.put(message, lambda reply, number=number: self._replies.__setitem__(number, reply))
                numbers.append(number)
        self.pushed.append(len(numbers))
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self._check()
        found = []
        for number in message_ids:
            asked = self._asked[number]
            if number in self._replies:
                found.append(self._replies.pop(number))
            elif not self.nodes[asked.metadata.dst_node_id].online:
                asked.metadata.__dict__["_message_id"] = number
                found.append(Message(Error(ErrorCode.NODE_UNAVAILABLE, "it is offline"), reply_to=asked))
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        waiting = set(self.push_messages(messages))
        found: list[Message] = []
        end = time.monotonic() + (timeout or 60)
        while waiting and time.monotonic() < end:
            time.sleep(0.01)
            replies = list(self.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in replies}
            found += replies
        return found

    def _check(self) -> None:
        if self.failing is not None:
            failing, self.failing = self.failing, None
            raise failing


def node_of(device: Any, **config: Any) -> Node:
    """A node with this device."""

    def make(_context: Context, state: DeviceState) -> Any:
        if not isinstance(device, FakeDevice):
            device.state = state
        return device

    return Node(client_app(make), **config)
