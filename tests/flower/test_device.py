"""A node's state in Flower's context, and in a snapshot if that is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedbpt.device.device import Device
from fedbpt.device.state import DeviceState
from fedbpt.errors import DeviceFailedError
from fedbpt.flower import client_app
from fedbpt.flower.records import packed, reply_of
from fedbpt.protocol.rounds import DeviceInfo, RoundReport
from fedbpt.protocol.specs import Message as OurMessage
from fedbpt.tasks import read_rows
from tests.support.toy_scene import ToyTask
from tests.support.toy_scorer import ToyScorer
from tests.unit.device.test_local_fit import asked
from tests.unit.objective.test_privacy import ROWS, losses_of, plan


@pytest.fixture(autouse=True)
def _task() -> None:
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


class Node:
    """Serve each message with a new device, because each message has its own process."""

    def __init__(self, **config: Any) -> None:
        self.context = Context(1, 1, config, RecordDict(), {})
        self.scorers: list[ToyScorer] = []
        self._app = client_app(self._make)

    def _make(self, _context: Context, state: DeviceState) -> Device:
        self.scorers.append(ToyScorer())
        return Device("pi5", self.scorers[-1], ROWS, task=ToyTask(), state=state)

    def ask(self, message: OurMessage | None, kind: type[Any] = RoundReport, to: str = MessageType.TRAIN) -> Any:
        sent = Message(packed(message), 1, to)
        sent.metadata.__dict__["_message_id"] = "m"
        return reply_of(self._app(sent, self.context).content, kind, "pi5")

    def lose_context(self) -> None:
        self.context.state = RecordDict()


def test_the_context_keeps_the_noise_key_from_message_to_message() -> None:
    node, other = Node(), Node()
    assert (losses_of(node.ask(plan())) == losses_of(node.ask(plan(), RoundReport))).all()
    assert node.ask(plan(round=2)).round == 2
    assert (losses_of(node.ask(plan())) != losses_of(other.ask(plan()))).any()


def test_a_fit_is_scored_once_over_several_messages() -> None:
    node = Node()
    for fit in (asked(), asked(n_words=4, readout=None)):
        node.ask(msgspec.structs.replace(fit, task=ToyTask().identity))
    assert [bool(scorer.calls) for scorer in node.scorers] == [True, False]


def test_a_repeated_plan_gets_the_same_report_without_work() -> None:
    node = Node()
    first = node.ask(plan())
    assert node.ask(plan()) == first
    assert not node.scorers[-1].calls


def test_a_snapshot_restores_a_lost_context(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "pi5.state"
    node = Node(state=str(file))
    first = node.ask(plan())
    assert file.stat().st_mode & 0o777 == 0o600
    node.lose_context()
    assert node.ask(plan()) == first
    assert not node.scorers[-1].calls
    node.lose_context()
    assert (losses_of(node.ask(plan(deadline_s=9.0))) == losses_of(first)).all()  # as far as the noise goes, the same
    file.unlink()
    node.lose_context()
    assert (losses_of(node.ask(plan())) != losses_of(first)).any()


def test_a_damaged_snapshot_is_reported_and_not_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "pi5.state"
    file.write_bytes(b"damaged")
    file.chmod(0o600)
    with pytest.raises(DeviceFailedError, match=r"pi5\.state.*delete"):
        Node(state=str(file)).ask(None, DeviceInfo, MessageType.QUERY)
    assert file.read_bytes() == b"damaged"


def test_a_bug_in_the_device_is_a_reply_that_names_it() -> None:
    def broken(_context: Context, _state: DeviceState) -> Any:
        raise KeyError("the cat sat")

    node = Node()
    node._app = client_app(broken)
    with pytest.raises(DeviceFailedError, match=r"KeyError in .*broken \(line") as failed:
        node.ask(plan())
    assert "cat" not in str(failed.value)


def test_an_unreadable_file_is_reported_without_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "fine", "label": "the cat sat"}\n')

    def reads(_context: Context, state: DeviceState) -> Any:
        return Device("pi5", ToyScorer(), read_rows(file, ("a", "b")), task=ToyTask(), state=state)

    node = Node()
    node._app = client_app(reads)
    with pytest.raises(DeviceFailedError, match=r"rows\.jsonl:1") as failed:
        node.ask(plan())
    assert "cat" not in str(failed.value)
