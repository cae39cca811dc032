"""How a run looks while it runs: one live line for people, written to standard error."""

from __future__ import annotations

from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from fedbpt.estimate import spent_share
from fedbpt.plain_text import plain
from fedbpt.runs import (
    DeviceBack,
    DeviceLost,
    Evaluated,
    Event,
    LateReport,
    RoundClosed,
    RunFinished,
    RunSettings,
    RunStarted,
    Score,
    Steered,
    TemplateSelected,
)
from fedbpt.terminal import PlainConsole

_DOING = {"calibration": "calibrating", "probe": "baseline", "readout": "readout"}


def human_bytes(count: float) -> str:
    """``count`` bytes for people: 0.9 KB, 12.3 MB."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


class RunDisplay:
    """An `fedbpt.runs.EventCallback` that keeps one line up to date and prints what must not be missed above it.

    Use as a context manager around the run; ``shown`` False: silent.
    """

    def __init__(self, shown: bool = True) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(min_width=10, no_wrap=True)),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[figures]}", markup=False, table_column=Column(no_wrap=True)),
            TimeElapsedColumn(),
            console=PlainConsole(stderr=True),
            disable=not shown,
        )
        self._line = self._progress.add_task("connecting", total=None, figures="")
        self._settings = RunSettings()
        self._devices = self._live = 0
        self._started = False
        self._zero_shot: Score | None = None
        self._score: Score | None = None
        self._generates = False

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
                self._settings = event.settings
                self._devices, self._live = len(event.devices), len(event.live)
                if event.resumed:
                    self._say(f"run {event.run}: resumed after {event.resumed} rounds")
                self._update(f"choosing a template on {event.model_name}", None, "")
            case TemplateSelected():
                words = ", ".join(word.strip() for word in event.template.label_words)
                self._generates = not words
                self._say(f"template {event.template.pattern!r}" + (f" with {words}" if words else ""))
                self._update("tuning", None, "")
            case Evaluated():
                self._score = event.score
                if event.round == 0:
                    self._zero_shot = event.score
            case RoundClosed() if event.round > 0:
                self._live = len(event.reported)
                share = spent_share(self._settings, event.searched, event.evaluations, event.tokens, event.seconds)
                doing = f"round {event.searched}" if event.purpose == "search" else _DOING[event.purpose]
                if event.purpose == "search" and share == 1.0:
                    doing = "finishing"
                self._update(doing, share, self._figures(event, share))
            case DeviceLost():
                reason = event.reason.removeprefix(f"{event.device}: ")
                self._say(f"device {event.device} is lost in round {event.round}: {reason}", "yellow")
            case DeviceBack():
                self._say(f"device {event.device} is back in round {event.round}")
            case Steered():
                self._say(f"{'paused' if event.paused else 'under way'}; a round may take {event.deadline_s:g} s")
            case LateReport():
                self._say(f"device {event.device}: its report on round {event.round} came late and is not used")
            case RunFinished() if not self._started:
                self._say(f"run {event.result.run} was finished before: this is its result")

    def _figure(self, score: Score) -> str:
        return f"{score.perplexity:.2f}" if self._generates else f"{score.accuracy:.3f}"

    def _figures(self, event: RoundClosed, share: float) -> str:
        parts = []
        if self._score is not None:
            line = "" if self._zero_shot is None else f" (zero-shot {self._figure(self._zero_shot)})"
            parts.append(f"{'ppl' if self._generates else 'acc'} {self._figure(self._score)}{line}")
        # a private loss is noise about 0
        parts.append(f"loss {event.loss:.3f}" if event.epsilon is None else f"ε {event.epsilon:.2f}")
        parts.append(f"{self._live}/{self._devices} devices")
        parts.append(f"up {human_bytes(event.bytes_up)}  down {human_bytes(event.bytes_down)}")
        if 0 < share < 1 and event.seconds > 0:
            left = event.seconds * (1 - share) / share
            parts.append(f"eta {int(left) // 60}:{int(left) % 60:02d}")
        return "  ".join(parts)

    def _update(self, description: str, share: float | None, figures: str) -> None:
        """``share`` None: nobody knows how long this takes."""
        total = None if share is None else 1.0
        self._progress.update(
            self._line, description=plain(description), total=total, completed=share or 0.0, figures=plain(figures)
        )

    def _say(self, text: str, style: str | None = None) -> None:
        if not self._progress.disable:
            self._progress.console.print(text, style=style, highlight=False, soft_wrap=True)
