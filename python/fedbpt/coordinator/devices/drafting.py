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
from fedbpt.coordinator.clients.mailbox import REPLY_S
from fedbpt.coordinator.control import RunControl
from fedbpt.coordinator.devices.enrolment import DeviceRegistry
from fedbpt.coordinator.devices.members import MAX_NAMED_DEVICES
from fedbpt.coordinator.service.server import CoordinatorServer
from fedbpt.errors import DeviceError, QuorumError, WireError
from fedbpt.protocol.membership import misfit
from fedbpt.runs.submission import Submission
from fedbpt.tasks import Task

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
    `RETURN_S`. A device that was told to call later counts as soon as it has called.

    Args:
        known: enrolled devices that took part already; they belong to a resumed run, present or not.
        model_fingerprint: the model that they must have; empty: any.
        control: ends the wait when it is stopped.
        tell: called with a line about what is missing, whenever it changes.

    Raises:
        QuorumError: too few devices after ``wait_s`` seconds.
        RunStopped: by ``control``.
    """
    return asyncio.run(
        control.unless_stopped(_draft(submission, server, registry, known, model_fingerprint, wait_s, tell))
    )


async def _draft(
    submission: Submission,
    server: CoordinatorServer,
    registry: DeviceRegistry,
    known: Sequence[str],
    model_fingerprint: str,
    wait_s: float,
    tell: Callable[[str], None],
) -> list[str]:
    began = time.monotonic()
    inquiry = _Inquiry(server, submission.task, model_fingerprint)
    while True:
        await inquiry.go_on(POLL_S)
        expected = sum(line.state != "revoked" for line in registry.devices())
        reasons = inquiry.reasons
        fit = [name for name, reason in reasons.items() if not reason]
        wanted = submission.expect or max(expected - (len(reasons) - len(fit)), 1)
        needed = math.ceil(submission.settings.quorum * len(known))
        waited_s = time.monotonic() - began
        can_resume = known and len({*fit}.intersection(known)) >= needed and waited_s > min(RETURN_S, wait_s)
        is_late = waited_s > wait_s + (REPLY_S if inquiry.n_open else 0.0)
        can_begin = fit and not known and submission.expect is None and is_late
        if len(fit) >= wanted or can_resume or can_begin:
            return sorted({*fit, *known})
        why = _why(reasons, inquiry.n_later)
        what = f"{len(fit)} of {wanted} devices with task {submission.task.name!r} call in{why}"
        if is_late:
            raise QuorumError(
                f"{what} after {wait_s:g} s: {_advice(expected, inquiry.n_later, registry)}", limit=needed or wanted
            )
        tell(f"waiting: {what}")
        await asyncio.sleep(POLL_S)


class _Inquiry:
    """Asks all devices that call in what they have, again and again: tasks of the running event loop.

    Attributes:
        reasons: why each device that has replied cannot take part; empty: it can.
        n_later: number of devices that have not replied, since they were told to call later.
        n_open: number of devices that have not replied, but are to.
    """

    def __init__(self, server: CoordinatorServer, task: Task, model_fingerprint: str) -> None:
        self.reasons: dict[str, str] = {}
        self.n_later = 0
        self.n_open = 0
        self._server = server
        self._task = task.identity
        self._model_fingerprint = model_fingerprint or None
        self._asked: dict[str, asyncio.Task[str]] = {}

    async def go_on(self, wait_s: float) -> None:
        """Ask those that are not asked already, and take the replies of the next ``wait_s`` seconds."""
        present = self._server.present()
        for name in present:
            if name not in self._asked:
                self._asked[name] = asyncio.ensure_future(self._reason(self._server.client(name)))
        if self._asked:
            await asyncio.wait(self._asked.values(), timeout=wait_s)
        for name in [name for name, task in self._asked.items() if task.done()]:
            self.reasons[name] = self._asked.pop(name).result()
        self.reasons = {name: self.reasons[name] for name in present if name in self.reasons}
        waits = [name for name in present if name not in self.reasons]
        self.n_later = sum(self._server.office.due_s(name) > 0 for name in waits)
        self.n_open = len(waits) - self.n_later

    async def _reason(self, client: DeviceClient) -> str:
        try:
            info = await client.status()
        except (DeviceError, WireError) as error:
            return str(error)
        finally:
            await client.aclose()
        found = misfit(info, self._model_fingerprint, self._task)
        return "" if found is None else f"it {found.reason}"


def _why(reasons: Mapping[str, str], n_later: int) -> str:
    unfit = [f"{name}: {reason.removeprefix(f'{name}: ')}" for name, reason in reasons.items() if reason]
    more = [f"and {len(unfit) - MAX_NAMED_DEVICES} more"] if len(unfit) > MAX_NAMED_DEVICES else []
    later = [f"{n_later} told to call later"] if n_later else []
    found = unfit[:MAX_NAMED_DEVICES] + more + later
    return f" ({'; '.join(found)})" if found else ""


def _advice(expected: int, n_later: int, registry: DeviceRegistry) -> str:
    if not expected:
        invite = f"fedbpt devices invite NAME --registry {registry.path}"
        return f"no device is invited or enrolled, run `{invite}` where the coordinator runs"
    if n_later:
        return "start the coordinator with a longer --wait, and hand the run in again"
    return "start devices with this task, and hand the run in again"
