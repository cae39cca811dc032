"""A run on this machine alone: one device in this process. Ctrl-C ends the search and keeps what there is."""

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
"""Of the device."""

NO_DEADLINE_S: Final = 7 * 86400.0
"""Nobody waits for the device but its owner."""


class Ended(NamedTuple):
    """``interrupted``: the budget is not spent; the same run goes on when it is started again."""

    result: RunResult
    interrupted: bool


def settings_alone(settings: RunSettings) -> RunSettings:
    """``settings`` for a run whose one device is always there."""
    return msgspec.structs.replace(settings, quorum=1.0, deadline_s=NO_DEADLINE_S, stragglers=0.0)


@contextmanager
def clients_of(device: Device) -> Iterator[Callable[[], InProcessClient]]:
    """What makes a client of ``device``, again and again: their work is done one after the other, on one thread.

    A scoring call that cannot be interrupted may outlast the run that asked for it.
    """
    worker = Worker(f"fedbpt-{device.name}")
    try:
        yield lambda: InProcessClient(device, worker=worker)
    finally:
        worker.close()


def run_alone(begin: Callable[[RunSettings], Federation], settings: RunSettings) -> Ended:
    """The run that ``begin`` makes of ``settings``, each time anew, to the end of its budget, or until Ctrl-C.

    Then the readout is fitted to what was found, and evaluated, as if the budget had been spent. A second Ctrl-C ends
    that, too. Raises `KeyboardInterrupt` or `RunStopped` where no round of the search was closed; else as
    `Federation.run` does.
    """
    federation = begin(settings)
    try:
        return Ended(federation.run(), False)
    except (KeyboardInterrupt, RunStopped):
        searched = federation.searched
        if not searched:
            raise
        log.warning(
            "stopped after %d rounds of the search: finishing with what they found; Ctrl-C again ends at once", searched
        )
        spent = msgspec.structs.replace(settings, rounds=searched, evaluations=0, tokens=0, seconds=0.0)
        return Ended(begin(spent).run(), True)


def digest_of_rows(*splits: Sequence[Row]) -> str:
    """sha256 (hex) of rows; a stored run is of the rows that it was begun with."""
    found = hashlib.sha256()
    for rows in splits:
        plain = [(text, label if isinstance(label, str) else int(label)) for text, label in rows]
        found.update(msgspec.json.encode(plain) + b"\n")
    return found.hexdigest()
