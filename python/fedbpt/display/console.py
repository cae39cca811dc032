"""Progress of a run on standard error: a live line in a terminal, occasional lines in a log."""

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
    DeviceLeftOut,
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
from fedbpt.runs.result import UNSCORED, AnswerScore, Score, TemplateScore

MAX_SILENCE_S: Final = 30.0
"""Time after which the next round is logged in any case, in seconds."""

_MAX_WORDS_LENGTH: Final = 200  # characters of the label words that a line lists

STAGE_NAMES: Final[dict[RunStage, str]] = {
    "selection": "template",
    "calibration": "calibration",
    "probe": "first readout",
    "search": "search",
    "readout": "readout",
    "evaluation": "evaluation",
}
"""Displayed names of the stages of a run."""


def human_bytes(count: float) -> str:
    """Format a number of bytes: 0.9 KB, 12.3 MB."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


def describe_accuracy(candidate: TemplateScore) -> str:
    """A template's zero-shot accuracy with its 95 % interval, and a note if it is no better than chance.

    Of a task with a metric of generated answers, the metric's mean value.
    """
    if candidate.reward is not None:
        return f"answers are worth {candidate.reward:.3f}, of {candidate.n_answered} training rows"
    score = candidate.score
    n_labels = len(candidate.template.label_words)
    low, high = score.interval
    chance = "" if beats_chance(score.correct, score.n, n_labels) else f", no better than chance ({1 / n_labels:.3f})"
    return f"{score.accuracy:.3f} [{low:.3f}, {high:.3f}] of {score.n} training rows{chance}"


def describe_answers(score: AnswerScore) -> str:
    """What answers are worth, and how different they are."""
    failed = f", {score.n_failed:,} failed" if score.n_failed else ""
    return f"{score.mean:.3f} of {score.n:,} rows, {score.distinct:.0%} distinct{failed}"


class RunDisplay:
    """Shows the progress of a run on standard error: an `fedbpt.runs.events.EventCallback`.

    In a terminal, it updates a live line and prints important messages above it. Elsewhere, such as in a log, it prints
    a line from time to time. Use it as a context manager around the run.

    Args:
        shown: False: print nothing.
    """

    def __init__(self, shown: bool = True) -> None:
        console = self._console = PlainConsole(stderr=True)
        self._shown = shown
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(min_width=10, no_wrap=True)),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[left]}", markup=False, table_column=Column(no_wrap=True)),
            # Truncated if there is no room, so the least important figures come last.
            TextColumn(
                "{task.fields[figures]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
            ),
            TimeElapsedColumn(),
            console=console,
            disable=not (shown and console.is_terminal),
            expand=True,
        )
        self._line = self._progress.add_task("connecting", total=None, figures="", left="")
        self._n_devices = 0
        self._n_live = 0
        self._started = False
        self._zero_shot: Score | None = None
        self._said_unscored = False
        self._score: Score | None = None
        self._closed: RoundClosed | None = None
        self._share: float | None = None
        self._generates = False
        self._last_printed = ("", 0, -math.inf)  # stage, tenths of the budget, time

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
                self._n_devices = len(event.devices)
                self._n_live = len(event.live)
                if event.resumed:
                    self._print(f"run {event.run}: resumed after {event.searched} rounds")
                self._update(f"selecting a template on {event.model_name}", None, "")
            case StageBegan() if event.stage != "selection":  # `RunStarted` has shown that
                left = None if self._closed is None else self._closed.eta_s
                self._update(STAGE_NAMES[event.stage], self._share, self._figures(self._closed), _eta(left))
            case TemplateSelected():
                words = ", ".join(word.strip() for word in event.template.label_words)
                self._generates = not event.template.label_words
                if len(words) > _MAX_WORDS_LENGTH:
                    words = f"{words[:_MAX_WORDS_LENGTH]}… ({len(event.template.label_words)} label words)"
                for candidate in event.candidates:
                    figure = "" if candidate.reward is not None else "accuracy "
                    self._print(f"zero-shot {figure}{describe_accuracy(candidate)}: {candidate.template.pattern!r}")
                self._print(f"template {event.template.pattern!r}" + (f" with {words}" if words else ""))
            case Evaluated():
                if event.is_unscored and not self._said_unscored:
                    self._print(UNSCORED)
                    self._said_unscored = True
                self._score = event.score
                self._zero_shot = event.zero_shot
                self._update("evaluated", self._share, self._figures(self._closed))
            case RoundClosed() if event.round > 0:
                self._show_round(event)
            case DeviceLost():
                reason = event.reason.removeprefix(f"{event.device}: ")
                self._print(f"device {event.device} is lost: {reason}", "yellow")
            case DeviceLeftOut():
                self._print(f"device {event.device}: {event.reason}", "yellow")
            case DeviceBack():
                self._print(f"device {event.device} is back")
            case Steered():
                self._print(f"{'paused' if event.paused else 'running'}; round deadline {event.deadline_s:g} s")
            case LateReport():
                self._print(f"device {event.device}: a report arrived late and is not used")
            case RunFinished() if not self._started:
                self._print(
                    f"run {event.result.run} was finished before: showing its stored result (--fresh tunes again)"
                )

    def _show_round(self, event: RoundClosed) -> None:
        self._n_live = len(event.reported)
        self._closed = event
        self._share = event.share
        name = f"round {event.searched}" if event.purpose == "search" else STAGE_NAMES[event.purpose]
        self._update(name, event.share, self._figures(event), _eta(event.eta_s))

    def _figure(self, score: Score) -> str:
        return f"{score.perplexity:.2f}" if self._generates else f"{score.accuracy:.3f}"

    def _figures(self, event: RoundClosed | None) -> str:
        """The current figures, the most important first."""
        parts = []
        if self._score is not None and self._score.n:
            low, high = self._score.interval
            interval = "" if self._generates else f" [{low:.3f}, {high:.3f}]"
            parts.append(f"{'ppl' if self._generates else 'acc'} {self._figure(self._score)}{interval}")
        if self._zero_shot is not None and self._zero_shot.n:
            parts.append(f"zero-shot {self._figure(self._zero_shot)}")
        if event is not None:
            # With differential privacy, the loss is noise around 0.
            parts.append(f"loss {event.loss:.3f}" if event.epsilon is None else f"ε {event.epsilon:.2f}")
            if self._n_devices > 1:
                parts.append(f"{self._n_live}/{self._n_devices} devices")
                parts.append(f"up {human_bytes(event.bytes_up)}  down {human_bytes(event.bytes_down)}")
        return "  ".join(parts)

    def _update(self, description: str, share: float | None, figures: str, left: str = "") -> None:
        """Update the live line, or log a line. ``share``: of the budget spent; None: unknown."""
        total = None if share is None else 1.0
        self._progress.update(
            self._line,
            description=plain(description),
            total=total,
            completed=share or 0.0,
            figures=plain(figures),
            left=left,
        )
        if self._shown and self._progress.disable:
            self._print_if_due(description, share, "  ".join(filter(None, (left, figures))))

    def _print_if_due(self, description: str, share: float | None, figures: str) -> None:
        """Print a line at the start of a stage or a tenth of the budget, and after `MAX_SILENCE_S` without one."""
        stage = description.split()[0]
        tenth = int(10 * (share or 0.0))
        last_stage, last_tenth, last_time = self._last_printed
        now = time.monotonic()
        if (stage, tenth) != (last_stage, last_tenth) or now - last_time > MAX_SILENCE_S:
            self._last_printed = (stage, tenth, now)
            done = "" if share is None else f"  {share:.0%}"
            self._print(f"{description}{done}  {figures}".rstrip())

    def _print(self, text: str, style: str | None = None) -> None:
        if self._shown:
            self._console.print(text, style=style, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Format a duration: ``0:43``, ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _eta(seconds: float | None) -> str:
    return "" if seconds is None else f"eta {duration(seconds)}"
