"""What a page shows, as immutable values made by `fedbpt.dashboard.state`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from fedbpt.runs.events import RunStage
from fedbpt.runs.intervals import Interval
from fedbpt.runs.result import Split

Status: TypeAlias = Literal["waiting", "running", "pausing", "paused", "stopped", "finished"]
DeviceStatus: TypeAlias = Literal["absent", "live", "paused", "silent", "lost", "done"]


class Point(NamedTuple):
    """A value after a round of the search."""

    round: int
    value: float


class Measured(NamedTuple):
    """Accuracy (0 to 1) with its 95 % interval, or perplexity without one, on ``n`` rows."""

    value: float
    n: int
    interval: Interval | None


class Stage(NamedTuple):
    """The result of a step of the run on each split; None: not measured."""

    title: str
    dev: Measured | None
    test: Measured | None


class Notice(NamedTuple):
    """A message. ``time``: UTC, ISO 8601; ``bad``: it is a problem, and highlighted."""

    time: str
    text: str
    bad: bool


@dataclass(frozen=True)
class DeviceView:
    """One device. None: unknown.

    Attributes:
        detail: reason or progress, in addition to ``status``.
        tokens_per_second: over all of its rounds.
        reports: number of rounds of the search in which it reported.
        loss: of its last round, in nats.
        figure: accuracy (0 to 1) with its 95 % ``interval``, or perplexity.
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
    """The current state of a run.

    Attributes:
        stage: the current one of the stages in ``path``.
        figure, zero_shot: accuracy (0 to 1) with 95 % intervals, or perplexity if ``generates``; None: not evaluated.
            Both on the same ``n_rows`` rows of ``split`` from start to end: development rows or, if there are none,
            test rows once the run is finished.
        unscored: whether the label words are too long to be scored, so that there is no zero-shot figure.
        not_better: whether the run ships the model without a prompt, as the tuned one was not better.
        futile: whether the search ended before its budget, as the prompt gained nothing over the readout without it.
        answers: mean metric of the model's own answers without and with the prompt; empty: not measured.
        searched: rounds of the search so far, of ``rounds_limit``.
        share: fraction of the budget spent, 0 to 1.
        participations: number of reports used in rounds of the search.
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
    unscored: bool
    not_better: bool
    futile: bool
    answers: str
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
        """Number of devices taking part now."""
        return sum(device.status in ("live", "paused") for device in self.devices)
