"""A run on this machine only, with one device in this process. Ctrl-C ends the search and keeps its result."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

import msgspec

from fedbpt.coordinator.clients import InProcessClient
from fedbpt.coordinator.federation import Federation
from fedbpt.device.agent.worker import Worker
from fedbpt.device.device import Device
from fedbpt.errors import RunStopped
from fedbpt.runs.result import RunResult
from fedbpt.runs.settings import RunSettings
from fedbpt.tasks.rows import Row

log = logging.getLogger(__name__)

NAME: Final = "this-machine"
"""Name of the device."""

NO_DEADLINE_S: Final = 7 * 86400.0
"""No deadline in practice: no other device waits."""


class Ended(NamedTuple):
    """``interrupted``: before the budget was spent; the same run goes on when it is started again."""

    result: RunResult
    interrupted: bool


def settings_alone(settings: RunSettings) -> RunSettings:
    """``settings`` for a run whose only device is always in reach."""
    return msgspec.structs.replace(settings, quorum=1.0, deadline_s=NO_DEADLINE_S, stragglers=0.0)


@contextmanager
def clients_of(device: Device) -> Iterator[Callable[[], InProcessClient]]:
    """Yield a function that makes clients of ``device``, which share one worker thread.

    So a scoring call that outlasts its run and the next run's calls do not run at the same time.
    """
    worker = Worker(f"fedbpt-{device.name}")
    try:
        yield lambda: InProcessClient(device, worker=worker)
    finally:
        worker.close()


def run_alone(begin: Callable[[RunSettings], Federation], settings: RunSettings) -> Ended:
    """Run the federation that ``begin`` makes of ``settings`` to the end of its budget, or until Ctrl-C.

    After Ctrl-C, a second federation fits the readout and evaluates the result, as if the budget were spent; another
    Ctrl-C ends that too.

    Raises:
        KeyboardInterrupt, RunStopped: no round of the search was closed.
        FedbptError: as `Federation.run`.
    """
    federation = begin(settings)
    try:
        return Ended(federation.run(), False)
    except (KeyboardInterrupt, RunStopped):
        searched = federation.searched
        if not searched:
            raise
        log.warning(
            "stopped after %d rounds of the search: finishing with their result; Ctrl-C again ends at once", searched
        )
        spent = msgspec.structs.replace(settings, rounds=searched, evaluations=0, tokens=0, seconds=0.0)
        return Ended(begin(spent).run(), True)


def digest_of_rows(*splits: Sequence[Row]) -> str:
    """sha256 (hex) of rows, by which a stored run is resumed with the same rows only."""
    found = hashlib.sha256()
    for rows in splits:
        plain = [(text, label if isinstance(label, str) else int(label)) for text, label in rows]
        found.update(msgspec.json.encode(plain) + b"\n")
    return found.hexdigest()
