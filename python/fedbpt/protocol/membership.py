"""Whether a device can take part in a run: it needs the run's task and model. Both sides of the wire check this."""

from __future__ import annotations

from typing import Literal, NamedTuple

from fedbpt.protocol.rounds import DeviceInfo
from fedbpt.protocol.task_identity import TaskIdentity


class Misfit(NamedTuple):
    """Why a device cannot take part. ``code``: see `DeviceRefusedError`; ``reason``: a clause about the device."""

    code: Literal["wrong-model", "wrong-task"]
    reason: str


def misfit(info: DeviceInfo, model_fingerprint: str | None, task: TaskIdentity | None) -> Misfit | None:
    """Why the device described by ``info`` cannot work on this model and task; None if it can.

    A ``model_fingerprint`` or ``task`` of None is not checked.
    """
    if task is not None:
        if info.task is None:
            return Misfit("wrong-task", "does not report its task: update fedbpt on that device")
        if difference := info.task.difference(task):
            return Misfit("wrong-task", difference)
    if model_fingerprint is not None and info.model_fingerprint != model_fingerprint:
        own = f"{info.model_name} ({info.model_fingerprint})"
        return Misfit(
            "wrong-model", f"has model {own}, the run uses {model_fingerprint}: start it with the run's model file"
        )
    return None
