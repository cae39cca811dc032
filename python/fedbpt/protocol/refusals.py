"""What a device's `ErrorReply` means: the codes of failed work, and the error that the coordinator raises."""

from __future__ import annotations

from typing import Final

from fedbpt.errors import DeviceError, DeviceFailedError, DeviceRefusedError
from fedbpt.protocol.rounds import ErrorReply

WORK_FAILED: Final = "work-failed"
"""The work ended in an error that fedbpt raises on purpose."""

WORK_FAULT: Final = "work-fault"
"""It ended in any other."""


def refusal_of(reply: ErrorReply, device: str) -> DeviceError:
    """`DeviceFailedError` where the work of ``device`` failed, else `DeviceRefusedError`."""
    if reply.code in (WORK_FAILED, WORK_FAULT):
        return DeviceFailedError(reply.message, is_fault=reply.code == WORK_FAULT, device=device)
    return DeviceRefusedError(reply.message, reply.code, device=device)
