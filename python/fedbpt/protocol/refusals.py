"""Turn a device's `ErrorReply` into the error that the coordinator raises."""

from __future__ import annotations

from typing import Final

from fedbpt.errors import DeviceError, DeviceFailedError, DeviceRefusedError
from fedbpt.protocol.rounds import ErrorReply

WORK_FAILED: Final = "work-failed"
"""Code of work that ended in a `FedbptError`."""

WORK_FAULT: Final = "work-fault"
"""Code of work that ended in any other exception."""


def refusal_of(reply: ErrorReply, device: str) -> DeviceError:
    """`DeviceFailedError` if the work of ``device`` failed, else `DeviceRefusedError`."""
    if reply.code in (WORK_FAILED, WORK_FAULT):
        return DeviceFailedError(reply.message, is_fault=reply.code == WORK_FAULT, device=device)
    return DeviceRefusedError(reply.message, reply.code, device=device)
