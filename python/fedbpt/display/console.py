"""How a run looks while it runs: one live line for people, written to standard error."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Final

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from fedbpt.display.plain_console import PlainConsole
from fedbpt.plain_text import plain
from fedbpt.runs.events import (
    DeviceBack,
    DeviceLost,
    Evaluated,
    Event,
    LateReport,
    RoundClosed,
    RunFinished,
    RunStage,
    RunStarted,
    StageBegan,
    Steered,
    TemplateSelected,
)
from fedbpt.runs.intervals import beats_chance
from fedbpt.runs.result import Score, TemplateScore

QUIET_S: Final = 30.0
"""How long a run that is shown in a log says nothing at most, seconds; it speaks when a round closes."""

DOING: Final[dict[RunStage, str]] = {
    "selection": "template",
    "calibration": "calibration",
    "probe": "baseline",
    "search": "search",
    "readout": "readout",
    "evaluation": "evaluation",
}
"""The stages of a run, for people."""


def human_bytes(count: float) -> str:
    """``count`` bytes for people: 0.9 KB, 12.3 MB."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


def describe_accuracy(candidate: TemplateScore) -> str:
    """A template's accuracy without a prompt, its 95 % interval, and whether it beats guessing among the labels."""
    score, n_labels = candidate.score, len(candidate.template.label_words)
    low, high = score.interval
    chance = "" if beats_chance(score.correct, score.n, n_labels) else f", no better than chance ({1 / n_labels:.3f})"
    return f"{score.accuracy:.3f} [{low:.3f}, {high:.3f}] of {score.n} training rows{chance}"


class RunDisplay:
    """An `fedbpt.runs.events.EventCallback` that shows how a run goes, on standard error: in a terminal a line that
    is kept up to date, with what must not be missed above it; elsewhere, such as in a log, a line now and then.

    Use as a context manager around the run; ``shown`` False: silent.
    """

    def __init__(self, shown: bool = True) -> None:
        console = self._console = PlainConsole(stderr=True)
        self._shown = shown
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(min_width=10, no_wrap=True)),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[left]}", markup=False, table_column=Column(no_wrap=True)),
            # what there is no room for is left out at its end: the least important stands there
            TextColumn(
                "{task.fields[figures]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
            ),
            TimeElapsedColumn(),
            console=console,
            disable=not (shown and console.is_terminal),
            expand=True,
        )
        self._line = self._progress.add_task("connecting", total=None, figures="", left="")
        self._devices = self._live = 0
        self._started = False
        self._zero_shot: Score | None = None
        self._score: Score | None = None
        self._closed: RoundClosed | None = None
        self._share: float | None = None
        self._generates = False
        self._printed = ("", 0, -math.inf)  # stage, tenths of the budget, when

    def __enter__(self) -> RunDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._started = True
                self._devices, self._live = len(event.devices), len(event.live)
                if event.resumed:
                    self._say(f"run {event.run}: resumed after {event.searched} rounds")
                self._update(f"choosing a template on {event.model_name}", None, "")
            case StageBegan() if event.stage != "selection":  # that is said already
                left = None if self._closed is None else self._closed.eta_s
                self._update(DOING[event.stage], self._share, self._figures(self._closed), _eta(left))
            case TemplateSelected():
                words = ", ".join(word.strip() for word in event.template.label_words)
                self._generates = not words
                for candidate in event.candidates:
                    self._say(f"zero-shot accuracy {describe_accuracy(candidate)}: {candidate.template.pattern!r}")
                self._say(f"template {event.template.pattern!r}" + (f" with {words}" if words else ""))
            case Evaluated():
                self._score, self._zero_shot = event.score, event.zero_shot
                self._update("evaluated", self._share, self._figures(self._closed))
            case RoundClosed() if event.round > 0:
                self._show_round(event)
            case DeviceLost():
                reason = event.reason.removeprefix(f"{event.device}: ")
                self._say(f"device {event.device} is lost: {reason}", "yellow")
            case DeviceBack():
                self._say(f"device {event.device} is back")
            case Steered():
                self._say(f"{'paused' if event.paused else 'under way'}; a round may take {event.deadline_s:g} s")
            case LateReport():
                self._say(f"device {event.device}: a report came late and is not used")
            case RunFinished() if not self._started:
                self._say(f"run {event.result.run} was finished before: this is its result")

    def _show_round(self, event: RoundClosed) -> None:
        self._live, self._closed = len(event.reported), event
        self._share = event.share
        doing = f"round {event.searched}" if event.purpose == "search" else DOING[event.purpose]
        self._update(doing, event.share, self._figures(event), _eta(event.eta_s))

    def _figure(self, score: Score) -> str:
        return f"{score.perplexity:.2f}" if self._generates else f"{score.accuracy:.3f}"

    def _figures(self, event: RoundClosed | None) -> str:
        """The most important first."""
        parts = []
        if self._score is not None and self._score.n:
            low, high = self._score.interval
            interval = "" if self._generates else f" [{low:.3f}, {high:.3f}]"
            parts.append(f"{'ppl' if self._generates else 'acc'} {self._figure(self._score)}{interval}")
        if self._zero_shot is not None and self._zero_shot.n:
            parts.append(f"zero-shot {self._figure(self._zero_shot)}")
        if event is not None:
            # a private loss is noise about 0
            parts.append(f"loss {event.loss:.3f}" if event.epsilon is None else f"ε {event.epsilon:.2f}")
            if self._devices > 1:
                parts.append(f"{self._live}/{self._devices} devices")
                parts.append(f"up {human_bytes(event.bytes_up)}  down {human_bytes(event.bytes_down)}")
        return "  ".join(parts)

    def _update(self, description: str, share: float | None, figures: str, left: str = "") -> None:
        """``share`` None: nobody knows how long this takes."""
        total = None if share is None else 1.0
        self._progress.update(
            self._line, description=plain(description), total=total, completed=share or 0.0, figures=plain(figures),
            left=left,
        )  # fmt: skip
        if self._shown and self._progress.disable:
            self._print_now_and_then(description, share, "  ".join(filter(None, (left, figures))))

    def _print_now_and_then(self, description: str, share: float | None, figures: str) -> None:
        """A line where a stage or another tenth of the budget begins, or nothing was printed for some time."""
        stage, tenth = description.split()[0], int(10 * (share or 0.0))
        before, tenth_before, printed = self._printed
        now = time.monotonic()
        if (stage, tenth) != (before, tenth_before) or now - printed > QUIET_S:
            self._printed = (stage, tenth, now)
            done = "" if share is None else f"  {share:.0%}"
            self._say(f"{description}{done}  {figures}".rstrip())

    def _say(self, text: str, style: str | None = None) -> None:
        if self._shown:
            self._console.print(text, style=style, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """As ``0:43``, ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _eta(seconds: float | None) -> str:
    return "" if seconds is None else f"eta {duration(seconds)}"
