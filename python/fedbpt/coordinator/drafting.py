"""Which devices that call in take part in a run: those that hold its task, and its model.

A device's owner has chosen its task and its rows, and the device says which (`DeviceInfo.task`): a run of any other
task leaves it out. The device checks this itself, too.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from fedbpt.coordinator.clients import DeviceClient
from fedbpt.coordinator.control import RunControl
from fedbpt.coordinator.enrolment import DeviceRegistry
from fedbpt.coordinator.members import MAX_NAMED_DEVICES
from fedbpt.coordinator.server import CoordinatorServer
from fedbpt.errors import DeviceError, QuorumError, RunStopped, WireError
from fedbpt.protocol.membership import misfit
from fedbpt.protocol.rounds import DeviceInfo
from fedbpt.runs.submission import Submission

RETURN_S: Final = 10.0
"""How long a resumed run waits for all of its devices, in seconds: after a short break they call within a few."""

POLL_S: Final = 0.5
"""Interval between two checks of which devices call in, in seconds."""


def draft(
    submission: Submission,
    server: CoordinatorServer,
    registry: DeviceRegistry,
    known: Sequence[str],
    model_fingerprint: str,
    wait_s: float,
    control: RunControl,
    tell: Callable[[str], None],
) -> list[str]:
    """Names of the devices that are to take part, sorted, as soon as all expected ones call in.

    Those are ``submission.expect`` or, if it is None, all that are enrolled or invited and do not have another task.
    A new run without ``expect`` begins with fewer after ``wait_s`` seconds, a resumed one with its quorum after
    `RETURN_S`.

    Args:
        known: enrolled devices that took part already; they belong to a resumed run, present or not.
        model_fingerprint: the model that they must have; empty: any.
        control: ends the wait when it is stopped.
        tell: called with a line about what is missing, whenever it changes.

    Raises:
        QuorumError: too few devices after ``wait_s`` seconds.
        RunStopped: by ``control``.
    """
    began = time.monotonic()
    while True:
        if control.stopped:
            raise RunStopped("the run was stopped: start it again to resume it")
        expected = sum(line.state != "revoked" for line in registry.devices())
        reasons = _ask(server, submission, model_fingerprint)
        fit = [name for name, reason in reasons.items() if not reason]
        wanted = submission.expect or max(expected - (len(reasons) - len(fit)), 1)
        needed = math.ceil(submission.settings.quorum * len(known))
        waited_s = time.monotonic() - began
        can_resume = known and len({*fit}.intersection(known)) >= needed and waited_s > min(RETURN_S, wait_s)
        can_begin = fit and not known and submission.expect is None and waited_s > wait_s
        if len(fit) >= wanted or can_resume or can_begin:
            return sorted({*fit, *known})
        what = f"{len(fit)} of {wanted} devices with task {submission.task.name!r} call in{_why(reasons)}"
        if waited_s > wait_s:
            raise QuorumError(f"{what} after {wait_s:g} s: {_advice(expected)}", limit=needed or wanted)
        tell(f"waiting: {what}")
        time.sleep(POLL_S)


def _ask(server: CoordinatorServer, submission: Submission, model_fingerprint: str) -> dict[str, str]:
    """Why each device that calls in cannot take part; empty: it can."""
    clients = [server.client(name) for name in server.present()]
    task = submission.task.identity

    async def reason(client: DeviceClient) -> str:
        try:
            info = await client.status()
        except (DeviceError, WireError) as error:
            return str(error)
        finally:
            await client.aclose()
        return _misfit(info)

    def _misfit(info: DeviceInfo) -> str:
        found = misfit(info, model_fingerprint or None, task)
        return "" if found is None else f"it {found.reason}"

    async def reasons() -> list[str]:
        return list(await asyncio.gather(*map(reason, clients)))

    return dict(zip([client.name for client in clients], asyncio.run(reasons()), strict=True))


def _why(reasons: Mapping[str, str]) -> str:
    unfit = [f"{name}: {reason.removeprefix(f'{name}: ')}" for name, reason in reasons.items() if reason]
    more = [f"and {len(unfit) - MAX_NAMED_DEVICES} more"] if len(unfit) > MAX_NAMED_DEVICES else []
    return f" ({'; '.join(unfit[:MAX_NAMED_DEVICES] + more)})" if unfit else ""


def _advice(expected: int) -> str:
    if not expected:
        return "no device is invited or enrolled, run `fedbpt devices invite NAME` on the coordinator"
    return "start devices with this task, and hand the run in again"
