"""Texts of the dashboard: sentences, and formatted numbers."""

from __future__ import annotations

from typing import Any, Final

from fedbpt.dashboard.views import DeviceView, Measured, RunView, Stage
from fedbpt.display import console
from fedbpt.display.console import STAGE_NAMES, human_bytes
from fedbpt.runs.intervals import Interval
from fedbpt.runs.result import FUTILE, NOT_BETTER, UNSCORED, Split

NONE: Final = "–"

STATUS: Final = {
    "waiting": "waiting for devices",
    "running": "running",
    "pausing": "pausing after this round",
    "paused": "paused",
    "stopped": "stopped",
    "finished": "finished",
}
STATUS_STYLE: Final = {
    "waiting": "quiet",
    "running": "",
    "pausing": "warn",
    "paused": "warn",
    "stopped": "bad",
    "finished": "",
}
DEVICE_STATUS: Final = {
    "absent": "absent",
    "live": "live",
    "paused": "paused",
    "silent": "no response",
    "lost": "lost",
    "done": "done",
}
DEVICE_STYLE: Final = {
    "absent": "quiet",
    "live": "",
    "paused": "warn",
    "silent": "bad",
    "lost": "bad",
    "done": "quiet",
}


_NUMBERS: Final = (
    "No",
    "One",
    "Two",
    "Three",
    "Four",
    "Five",
    "Six",
    "Seven",
    "Eight",
    "Nine",
    "Ten",
    "Eleven",
    "Twelve",
)
_MAX_LISTED_LABELS = 8
_MAX_LISTED_CHARACTERS = 80


def sentence(view: RunView) -> str:
    """A sentence about what the run does, for first-time visitors."""
    n = len(view.devices)
    if not (n and view.task):
        return "The run has not started yet."
    number = _NUMBERS[n] if n < len(_NUMBERS) else f"{n:,}"
    if n == 1:
        devices, verb, data = "device", "teaches", "its data never leave it"
    else:
        devices, verb, data = "devices", "teach", "their data never leave them"
    if view.status in ("finished", "stopped"):
        verb = "taught"
    return f"{number} {devices} {verb} a frozen {view.model or 'model'} {_aim(view)}; {data}."


def _aim(view: RunView) -> str:
    if view.generates:
        return f"to write like the examples of {view.task}"
    if not view.labels:
        return f"to classify {view.task}"
    *names, last = view.labels
    listed = f"{', '.join(names)} or {last}"
    if len(view.labels) > _MAX_LISTED_LABELS or len(listed) > _MAX_LISTED_CHARACTERS:
        listed = f"one of {len(view.labels):,} labels"
    return f"to classify {view.task} as {listed}"


def state(view: RunView) -> str:
    """The run's state, with its stage while it runs."""
    status = STATUS[view.status]
    return status if view.stage is None else f"{status} · {STAGE_NAMES[view.stage]}"


def figure(value: float | None, generates: bool) -> str:
    """An accuracy as ``92.0 %``, a perplexity as ``7.31``."""
    if value is None:
        return NONE
    return f"{value:.2f}" if generates else f"{100 * value:.1f} %"


def gain(view: RunView) -> str:
    """The gain over zero-shot, in percentage points or as a change of perplexity."""
    if view.figure is None or view.zero_shot is None or not view.searched:
        return ""
    change = view.figure - view.zero_shot
    return f"{change:+.2f}" if view.generates else f"{100 * change:+.1f} points"


ROWS: Final[dict[Split, str]] = {"dev": "development rows", "test": "test rows"}


def basis(view: RunView) -> str:
    """The zero-shot figure, and the rows on which the main figure is measured."""
    if view.figure is None:
        return "not evaluated yet"
    notes = {UNSCORED: view.unscored, NOT_BETTER: view.not_better, FUTILE: view.futile}
    before = "".join(f"{note} · " for note, is_so in notes.items() if is_so)
    if view.zero_shot is not None:
        before += f"zero-shot {_with_interval(view.zero_shot, view.zero_shot_interval, view.generates)} · "
    after = f" · {view.answers}" if view.answers else ""
    return f"{before}{view.n_rows:,} {ROWS[view.split]}{after}"


def confidence(view: RunView) -> str:
    """The confidence interval of the main figure."""
    return "" if view.interval is None else f"95 % interval {interval(view.interval)}"


def _with_interval(value: float, bounds: Interval | None, generates: bool) -> str:
    return figure(value, generates) + ("" if bounds is None else f" ({interval(bounds)})")


def interval(bounds: Interval) -> str:
    """``88.2 – 96.3 %``."""
    low, high = bounds
    return f"{100 * low:.1f} – {100 * high:.1f} %"


def stage_row(stage: Stage, generates: bool) -> dict[str, str]:
    """A row of the table of stages."""
    return {"title": stage.title, "dev": _measured(stage.dev, generates), "test": _measured(stage.test, generates)}


def _measured(found: Measured | None, generates: bool) -> str:
    if found is None:
        return NONE
    return _with_interval(found.value, found.interval, generates)


def duration(seconds: float | None) -> str:
    """``3:07``, ``1:02:03``."""
    return NONE if seconds is None else console.duration(seconds)


def rounds(view: RunView) -> str:
    """Rounds of the search so far, and their limit."""
    if view.status == "waiting":
        return NONE  # the settings are unknown
    return f"{view.searched:,}" + (f" / {view.rounds_limit:,}" if view.rounds_limit else "")


def progress(view: RunView) -> str:
    """The time that the run took, or that is left."""
    if view.status == "finished":
        return f"done in {duration(view.seconds)}"
    if view.status == "stopped":
        return "the same command resumes it"
    if view.eta_s is None:
        return ""
    return f"about {duration(view.eta_s)} left" if view.eta_s >= 1 else "nearly done"


def speed(view: RunView) -> str:
    """Throughput of all devices together over all rounds."""
    return f"{view.tokens / view.seconds:,.0f} tokens/s" if view.tokens and view.seconds else ""


def traffic(view: RunView) -> str:
    return f"{human_bytes(view.bytes_up)} up · {human_bytes(view.bytes_down)} down"


def device_row(device: DeviceView, generates: bool) -> dict[str, Any]:
    """A row of the table of devices."""
    return {
        "name": device.name,
        "state": DEVICE_STATUS[device.status],
        "style": DEVICE_STYLE[device.status],
        "detail": device.detail,
        "speed": _number(device.tokens_per_second, " tok/s"),
        "memory": _bytes(device.rss_bytes),
        "health": _health(device),
        "up": _bytes(device.bytes_up),
        "down": _bytes(device.bytes_down),
        "reports": device.reports,
        "figure": NONE if device.figure is None else _with_interval(device.figure, device.interval, generates),
        "loss": _number(device.loss, "", 3),
    }


def _bytes(count: int) -> str:
    return human_bytes(count) if count else NONE


def _health(device: DeviceView) -> str:
    battery = "" if device.battery is None else f"{device.battery:.0f} %"
    celsius = "" if device.celsius is None else f"{device.celsius:.0f} °C"
    return " · ".join(part for part in (battery, celsius) if part) or NONE


def _number(value: float | None, unit: str, digits: int = 0) -> str:
    return NONE if value is None else f"{value:,.{digits}f}{unit}"
