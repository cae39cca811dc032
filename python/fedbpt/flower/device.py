"""`client_app`: a Flower ClientApp around our device. One message is one piece of work.

What the device remembers (`fedbpt.device.state`) and its last report lie in ``context.state``, which never leaves the
node; a SuperNode keeps that in memory alone, so where the node's configuration names a file (``state``), they are
written there too, and read where the context has none.
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
"""The device of a node: called for each message, with what it remembers."""

STATE_FILE: Final = "state"
"""Key of a node's configuration: the file of its snapshot."""


class Kept(specs.Message, frozen=True):
    """What is in ``context.state``, and in the snapshot."""

    state: bytes
    report: bytes = b""


@checked
def client_app(make_device: MakeDevice, mods: Sequence[Mod] = ()) -> ClientApp:
    """The ClientApp of a federation's devices. Errors of the work are replies, which name the reason.

    ``mods``: Flower's, around each message. Those that change arrays fail on ours, which hold none.
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
    """The report on a plan. The same plan again, from a server that was killed, is not worked on again."""
    plan = unpacked(message.content, RoundPlan)
    if kept.report:
        report = codec.decode(kept.report, RoundReport)
        if report.plan_digest == codec.digest(plan):
            return report
    return device.run(plan, _unheard, _never)


def _evaluation(message: Message, device: LocalDevice) -> EvaluateReport:
    return device.evaluate(unpacked(message.content, EvaluateRequest), _unheard, _never)


def _served(
    message: Message, context: Context, make: MakeDevice, work: Callable[[LocalDevice, Kept], specs.Message]
) -> Message:
    answer: specs.Message
    try:
        kept = _kept(context)
        state = DeviceState.from_bytes(kept.state) if kept.state else DeviceState()
        answer = work(make(context, state), kept)
        report = codec.encode(answer) if isinstance(answer, RoundReport) else kept.report
        _keep(context, kept, Kept(state=state.to_bytes(), report=report))
    except FedbptError as error:
        log.warning("work of node %d failed: %s", context.node_id, error)
        answer = ErrorReply(code=WORK_FAILED, message=public_reason(error))
    except Exception as error:
        log.exception("work of node %d failed", context.node_id)
        answer = ErrorReply(code=WORK_FAULT, message=public_reason(error))
    return Message(packed(answer), reply_to=message)


def _kept(context: Context) -> Kept:
    record = context.state.config_records.get(RECORD)
    if record is not None and isinstance(body := record["body"], bytes):
        return codec.decode(body, Kept, _MOST_BYTES)
    path = _snapshot(context)
    if path is None or not path.exists():
        return Kept(state=b"")
    try:
        return codec.decode(read_private(path), Kept, _MOST_BYTES)
    except WireError as error:
        raise ConfigError(f"the snapshot {path} is damaged: delete it, and the device begins anew ({error})") from error


def _keep(context: Context, before: Kept, now: Kept) -> None:
    if now == before:
        return
    body = codec.encode(now)
    context.state[RECORD] = ConfigRecord({"body": body})
    if (path := _snapshot(context)) is not None:
        write_private(path, body)


_MOST_BYTES: Final = 2 * codec.MAX_BODY_BYTES


def _snapshot(context: Context) -> Path | None:
    named = context.node_config.get(STATE_FILE)
    return expanded(str(named)) if named else None


def _unheard(_done: int, _total: int) -> None:
    """A reply is all that a node sends: nobody hears of progress."""


def _never() -> bool:
    """Flower tells no node to stop."""
    return False
