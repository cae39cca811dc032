"""What a page shows, as plain values: made by `fedbpt.dashboard.state`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from fedbpt.runs.events import RunStage
from fedbpt.runs.intervals import Interval
from fedbpt.runs.result import Split

Status: TypeAlias = Literal["waiting", "running", "pausing", "paused", "stopped", "finished"]
DeviceStatus: TypeAlias = Literal["absent", "live", "paused", "silent", "lost", "done"]


class Point(NamedTuple):
    """A figure after a round; rounds are those of the search."""

    round: int
    value: float


class Measured(NamedTuple):
    """A figure of ``n`` rows: accuracy (0 to 1) with its 95 % interval, or perplexity without one."""

    value: float
    n: int
    interval: Interval | None


class Stage(NamedTuple):
    """What a step of the run gives, on the rows of each split; None: not measured."""

    title: str
    dev: Measured | None
    test: Measured | None


class Notice(NamedTuple):
    """Something that happened. ``time``: UTC, ISO 8601; ``bad``: people should know of it."""

    time: str
    text: str
    bad: bool


@dataclass(frozen=True)
class DeviceView:
    """One device. ``detail`` says why or where; None: not known. ``figure``: accuracy (0 to 1) with its 95 %
    ``interval``, or perplexity. ``tokens_per_second``: over all of its rounds; ``reports``: rounds of the search
    that it reported in.
    """

    name: str
    status: DeviceStatus
    detail: str
    tokens_per_second: float | None
    rss_bytes: int
    celsius: float | None
    battery: float | None
    bytes_up: int
    bytes_down: int
    reports: int
    loss: float | None
    figure: float | None
    interval: Interval | None


@dataclass(frozen=True)
class RunView:
    """A run as it stands. ``figure`` and ``zero_shot``: accuracy (0 to 1), or perplexity where ``generates``.

    They are of the same ``n_rows`` rows of ``split`` from the run's start to its end: development rows, or where there
    are none, once it is finished, test rows. None: not evaluated. The intervals: of the accuracies, 95 %.
    ``stage``: where it is now, on its ``path``.
    ``share``: of the budget that is spent, 0 to 1. ``participations``: reports that made rounds of the search.
    """

    run: str
    task: str
    model: str
    model_fingerprint: str
    method: str
    status: Status
    stage: RunStage | None
    path: tuple[RunStage, ...]
    labels: tuple[str, ...]
    generates: bool
    figure: float | None
    zero_shot: float | None
    zero_shot_interval: Interval | None
    n_rows: int
    interval: Interval | None
    split: Split
    stages: tuple[Stage, ...]
    loss: float | None
    searched: int
    rounds_limit: int
    evaluations: int
    tokens: int
    seconds: float
    share: float
    eta_s: float | None
    epsilon: float | None
    participations: int
    bytes_up: int
    bytes_down: int
    peak_rss_bytes: int
    deadline_s: float
    template: str
    devices: tuple[DeviceView, ...]
    notices: tuple[Notice, ...]

    @property
    def live(self) -> int:
        """Devices that take part now."""
        return sum(device.status in ("live", "paused") for device in self.devices)
