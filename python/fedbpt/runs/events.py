"""Events of a run, one struct each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import msgspec

from fedbpt.protocol.specs import Message, Template
from fedbpt.quantities import NaturalInt
from fedbpt.runs.result import NO_SCORE, RunResult, Score, TemplateScore
from fedbpt.runs.settings import RunSettings

RoundPurpose: TypeAlias = Literal["selection", "calibration", "probe", "search", "readout"]
RunStage: TypeAlias = RoundPurpose | Literal["evaluation"]


class RunStarted(Message, frozen=True, tag=True):
    """``devices``: all; ``live``: those that responded. ``resumed``: number of closed rounds taken from the store, of
    which ``searched`` are rounds of the search.
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
    """The run has entered ``stage``."""

    stage: RunStage


class TemplateSelected(Message, frozen=True, tag=True):
    """``losses``: mean loss of each candidate on the training rows, nats; empty if there was only one.

    ``candidates``: their scores; empty also for target texts and in a private run, which count no correct answers.
    """

    template: Template
    index: NaturalInt
    losses: tuple[float, ...]
    candidates: tuple[TemplateScore, ...] = ()


class Progressed(Message, frozen=True, tag=True):
    """Progress of a working device. ``paused``: why its work is paused; empty: it is not."""

    device: str
    round: NaturalInt
    done: NaturalInt
    total: NaturalInt
    paused: str = ""


class RoundClosed(Message, frozen=True, tag=True):
    """Totals are since the start of the run. ``loss``: mean over the round's candidates, weighted by rows, nats.

    ``searched``: rounds of the search so far. ``epsilon``: spent so far, at the settings' δ; None: not private.
    ``share``: spent share of the budget, 0 to 1. ``eta_s``: seconds until the result; None: unknown.
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
    """Score on ``dev`` rows of the result if the search ended after ``round``; round 0 is zero-shot.

    ``zero_shot`` and ``stages`` (keys of `BASELINES`) are of the same rows.
    """

    round: NaturalInt
    score: Score
    devices: tuple[str, ...]
    zero_shot: Score = NO_SCORE
    stages: dict[str, Score] = msgspec.field(default_factory=dict)

    @property
    def is_unscored(self) -> bool:
        """Whether the label words are too long to be scored, so that there is no zero-shot figure."""
        return bool(self.score.n) and not self.zero_shot.n and "probe" in self.stages


class DeviceLost(Message, frozen=True, tag=True):
    """``device`` is out of ``round``, for ``reason``. It is called again until it responds."""

    device: str
    round: NaturalInt
    reason: str


class DeviceBack(Message, frozen=True, tag=True):
    """``device`` responds again and takes part from ``round`` on."""

    device: str
    round: NaturalInt


class DeviceLeftOut(Message, frozen=True, tag=True):
    """The report of ``device`` is left out of ``round``, for ``reason``, and it is not asked in later rounds."""

    device: str
    round: NaturalInt
    reason: str


class LateReport(Message, frozen=True, tag=True):
    """A report arrived after its round had closed: it is recorded, but not used."""

    device: str
    round: NaturalInt


class Steered(Message, frozen=True, tag=True):
    """The run was paused or resumed, or its deadline (seconds) changed: its new state."""

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
    | DeviceLeftOut
    | LateReport
    | Steered
    | RunFinished
)
EventCallback: TypeAlias = Callable[[Event], None]
