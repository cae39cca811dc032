"""Messages between `fedbpt tune --coordinator` and `fedbpt coordinator`, which runs what it is handed.

A run is handed in without rows: they are on the devices.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

import msgspec

from fedbpt.protocol.specs import Fingerprint, Message, Name
from fedbpt.quantities import NaturalInt, PositiveInt
from fedbpt.runs.settings import RunSettings
from fedbpt.tasks import Task

RUNS_PATH: Final = "/v1/runs"

JobState: TypeAlias = Literal["queued", "running", "finished", "failed", "cancelled"]


class Submission(Message, frozen=True):
    """A run to be run.

    Attributes:
        model_fingerprint: the model that its devices must have; empty: any, but all the same.
        expect: number of devices to wait for; None: all that are enrolled or invited and may have the task.
        fresh: replace a stored run of this name instead of resuming it.
    """

    run: Name
    task: Task
    settings: RunSettings
    model_fingerprint: Fingerprint = ""
    expect: PositiveInt | None = None
    fresh: bool = False
    protocol: Literal[1] = 1


class Job(Message, frozen=True):
    """A run that was handed in.

    Attributes:
        task, method: of the run.
        ahead: number of runs before it; 0 once it runs.
        detail: why it failed, or what it waits for; empty: neither.
        handed_in, ended: UTC, ISO 8601; ``ended`` is empty until then.
    """

    run: Name
    task: str
    method: str
    state: JobState
    ahead: NaturalInt = 0
    detail: Annotated[str, msgspec.Meta(max_length=4000)] = ""
    handed_in: str = ""
    ended: str = ""

    @property
    def is_over(self) -> bool:
        return self.state in ("finished", "failed", "cancelled")


class Jobs(Message, frozen=True):
    """The runs that were handed in: those that are over first, then in the order in which they run."""

    jobs: tuple[Job, ...] = ()
