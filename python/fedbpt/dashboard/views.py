"""What a page shows, as plain values: made by `fedbpt.dashboard.state`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

Status: TypeAlias = Literal["waiting", "running", "pausing", "paused", "stopped", "finished"]
DeviceStatus: TypeAlias = Literal["absent", "live", "paused", "silent", "lost", "done"]


class Point(NamedTuple):
    """A figure after a round."""

    round: int
    value: float


class Notice(NamedTuple):
    """Something that happened. ``time``: UTC, ISO 8601; ``bad``: people should know of it."""

    time: str
    text: str
    bad: bool


@dataclass(frozen=True)
class DeviceView:
    """One device. ``detail`` says why or where; None: not known. ``figure``: accuracy (0 to 1) or perplexity."""

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
    zero_shot: float | None


@dataclass(frozen=True)
class RunView:
    """A run as it stands. ``figure`` and ``zero_shot``: accuracy (0 to 1), or perplexity where ``generates``.

    They are of ``n_rows`` development rows, once the run is ``finished`` of test rows; None: not evaluated.
    ``share``: of the budget that is spent, 0 to 1. ``participations``: reports that made rounds of the search.
    """

    run: str
    task: str
    model: str
    model_fingerprint: str
    method: str
    status: Status
    doing: str
    generates: bool
    figure: float | None
    zero_shot: float | None
    n_rows: int
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
