"""Whether a device can take part in a run: it needs the same task and model. Both sides of the wire ask."""

from __future__ import annotations

from typing import Literal, NamedTuple

from fedbpt.protocol.rounds import DeviceInfo
from fedbpt.protocol.task_identity import TaskIdentity


class Misfit(NamedTuple):
    """Why a device cannot take part. ``code`` as in `DeviceRefusedError`; ``reason`` continues the device's name."""

    code: Literal["wrong-model", "wrong-task"]
    reason: str


def misfit(info: DeviceInfo, model_fingerprint: str | None, task: TaskIdentity | None) -> Misfit | None:
    """Why the device of ``info`` cannot do work for this model and this task, None standing for any; None: it can."""
    if task is not None:
        if info.task is None:
            return Misfit("wrong-task", "does not say which task its rows are of: update fedbpt there")
        if difference := info.task.difference(task):
            return Misfit("wrong-task", difference)
    if model_fingerprint is not None and info.model_fingerprint != model_fingerprint:
        own = f"{info.model_name} ({info.model_fingerprint})"
        return Misfit(
            "wrong-model", f"has the model {own}, the run uses {model_fingerprint}: start it with the run's model file"
        )
    return None
