"""`client_app`: a Flower ClientApp around a fedbpt device. Each message is one piece of work.

The device's state (`fedbpt.device.state`) and its last report are kept in ``context.state``, which never leaves the
node. A SuperNode keeps that only in memory; if the node's configuration names a file (``state``), a snapshot is
written there, and read if the context has no state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeAlias

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod

from fedbpt.argument_types import checked
from fedbpt.device.agent.service import LocalDevice
from fedbpt.device.state import DeviceState
from fedbpt.errors import ConfigError, FedbptError, WireError
from fedbpt.faults import public_reason
from fedbpt.flower.records import RECORD, packed, unpacked
from fedbpt.machine.folders import expanded
from fedbpt.net.tokens import read_private, write_private
from fedbpt.protocol import codec, specs
from fedbpt.protocol.refusals import WORK_FAILED, WORK_FAULT
from fedbpt.protocol.rounds import ErrorReply, EvaluateReport, EvaluateRequest, RoundPlan, RoundReport

log = logging.getLogger(__name__)

MakeDevice: TypeAlias = Callable[[Context, DeviceState], LocalDevice]
"""Makes the device of a node; called for each message, with the device's state."""

STATE_FILE: Final = "state"
"""Key of a node's configuration with the path of its snapshot."""


class Kept(specs.Message, frozen=True):
    """The content of ``context.state`` and of the snapshot."""

    state: bytes
    report: bytes = b""


@checked
def client_app(make_device: MakeDevice, mods: Sequence[Mod] = ()) -> ClientApp:
    """Make the ClientApp of a federation's devices. Errors of the work are sent as replies.

    Args:
        make_device: makes a node's device.
        mods: Flower's, around each message. Mods that change arrays fail, because fedbpt's messages contain none.
    """
    app = ClientApp(mods=list(mods))

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return _served(message, context, make_device, lambda device, _kept: device.info())

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _served(message, context, make_device, lambda device, kept: _round(message, device, kept))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _served(message, context, make_device, lambda device, _kept: _evaluation(message, device))

    return app


def _round(message: Message, device: LocalDevice, kept: Kept) -> RoundReport:
    """The report on a plan. If a restarted server sends the last plan again, the stored report is returned."""
    plan = unpacked(message.content, RoundPlan)
    if kept.report:
        report = codec.decode(kept.report, RoundReport)
        if report.plan_digest == codec.digest(plan):
            return report
    return device.run(plan, _ignore_progress, _never_cancelled)


def _evaluation(message: Message, device: LocalDevice) -> EvaluateReport:
    return device.evaluate(unpacked(message.content, EvaluateRequest), _ignore_progress, _never_cancelled)


def _served(
    message: Message, context: Context, make: MakeDevice, work: Callable[[LocalDevice, Kept], specs.Message]
) -> Message:
    reply: specs.Message
    try:
        kept = _load_kept(context)
        state = DeviceState.from_bytes(kept.state) if kept.state else DeviceState()
        reply = work(make(context, state), kept)
        report = codec.encode(reply) if isinstance(reply, RoundReport) else kept.report
        _save_kept(context, kept, Kept(state=state.to_bytes(), report=report))
    except FedbptError as error:
        log.warning("work of node %d failed: %s", context.node_id, error)
        reply = ErrorReply(code=WORK_FAILED, message=public_reason(error))
    except Exception as error:
        log.exception("work of node %d failed", context.node_id)
        reply = ErrorReply(code=WORK_FAULT, message=public_reason(error))
    return Message(packed(reply), reply_to=message)


def _load_kept(context: Context) -> Kept:
    record = context.state.config_records.get(RECORD)
    if record is not None and isinstance(body := record["body"], bytes):
        return codec.decode(body, Kept, _MAX_BYTES)
    path = _snapshot_path(context)
    if path is None or not path.exists():
        return Kept(state=b"")
    try:
        return codec.decode(read_private(path), Kept, _MAX_BYTES)
    except WireError as error:
        raise ConfigError(
            f"the snapshot {path} is damaged ({error}): delete it to start with a new state", field=STATE_FILE
        ) from error


def _save_kept(context: Context, before: Kept, now: Kept) -> None:
    if now == before:
        return
    body = codec.encode(now)
    context.state[RECORD] = ConfigRecord({"body": body})
    if (path := _snapshot_path(context)) is not None:
        write_private(path, body)


_MAX_BYTES: Final = 2 * codec.MAX_BODY_BYTES


def _snapshot_path(context: Context) -> Path | None:
    named = context.node_config.get(STATE_FILE)
    return expanded(str(named)) if named else None


def _ignore_progress(_done: int, _total: int) -> None:
    """Do nothing, because a node can only send its reply."""


def _never_cancelled() -> bool:
    """False, because Flower cannot stop a node's work."""
    return False
