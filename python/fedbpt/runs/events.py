"""What a run tells while it goes on: one struct an event."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import msgspec

from fedbpt.protocol.specs import (
    Message,
    Template,
)
from fedbpt.quantities import NaturalInt
from fedbpt.runs.result import NO_SCORE, RunResult, Score, TemplateScore
from fedbpt.runs.settings import RunSettings

RoundPurpose: TypeAlias = Literal["selection", "calibration", "probe", "search", "readout"]
RunStage: TypeAlias = RoundPurpose | Literal["evaluation"]


# --- events ----------------------------------------------------------------------------------------------------------


class RunStarted(Message, frozen=True, tag=True):
    """``resumed``: number of closed rounds taken from the store, ``searched`` of them of the search; ``devices``: all;
    ``live``: those that answered.
    """

    run: str
    devices: tuple[str, ...]
    live: tuple[str, ...]
    model_name: str
    model_fingerprint: str
    resumed: NaturalInt
    settings: RunSettings
    searched: NaturalInt = 0


class StageBegan(Message, frozen=True, tag=True):
    """The run is at ``stage`` from now on."""

    stage: RunStage


class TemplateSelected(Message, frozen=True, tag=True):
    """``losses``: mean loss of each candidate on the training rows, nats; empty where there was nothing to select.

    ``candidates``: their scores; empty too where nobody counts right answers: of target texts, in a private run.
    """

    template: Template
    index: NaturalInt
    losses: tuple[float, ...]
    candidates: tuple[TemplateScore, ...] = ()


class Progressed(Message, frozen=True, tag=True):
    """A device that is at work said where it stands. ``paused``: why its work waits; empty: it does not."""

    device: str
    round: NaturalInt
    done: NaturalInt
    total: NaturalInt
    paused: str = ""


class RoundClosed(Message, frozen=True, tag=True):
    """Totals are since the run began; ``loss`` is the round's mean over candidates, weighted by rows, nats.

    ``searched``: rounds of the search so far. ``epsilon``: spent so far, at the settings' δ; None: not private.
    ``share``: of the budget that is spent, 0 to 1; ``eta_s``: seconds until the result; None: nobody knows.
    """

    round: NaturalInt
    purpose: RoundPurpose
    searched: NaturalInt
    reported: tuple[str, ...]
    missing: tuple[str, ...]
    loss: float
    evaluations: NaturalInt
    tokens: NaturalInt
    seconds: float
    bytes_up: NaturalInt
    bytes_down: NaturalInt
    epsilon: float | None = None
    share: float = 0.0
    eta_s: float | None = None


class Evaluated(Message, frozen=True, tag=True):
    """What would be shipped if the search ended after ``round``, on ``dev`` rows; round 0 is zero-shot.

    ``zero_shot`` and ``stages``, by their keys in `BASELINES`, are of the same rows.
    """

    round: NaturalInt
    score: Score
    devices: tuple[str, ...]
    zero_shot: Score = NO_SCORE
    stages: dict[str, Score] = msgspec.field(default_factory=dict)


class DeviceLost(Message, frozen=True, tag=True):
    """``device`` does not count in ``round`` (any more), and why. It is looked for until it answers."""

    device: str
    round: NaturalInt
    reason: str


class DeviceBack(Message, frozen=True, tag=True):
    """``device`` answers again and takes part from ``round`` on."""

    device: str
    round: NaturalInt


class LateReport(Message, frozen=True, tag=True):
    """A report came after its round had closed: recorded, not used."""

    device: str
    round: NaturalInt


class Steered(Message, frozen=True, tag=True):
    """Somebody paused or resumed the run, or changed its deadline (seconds): so it is from now on."""

    paused: bool
    deadline_s: float


class RunFinished(Message, frozen=True, tag=True):
    result: RunResult


Event: TypeAlias = (
    RunStarted
    | StageBegan
    | TemplateSelected
    | Progressed
    | RoundClosed
    | Evaluated
    | DeviceLost
    | DeviceBack
    | LateReport
    | Steered
    | RunFinished
)
EventCallback: TypeAlias = Callable[[Event], None]
