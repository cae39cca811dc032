"""The dashboard's words and numbers."""

from __future__ import annotations

from typing import Any, Final

from fedbpt.dashboard.views import DeviceView, Measured, RunView, Stage
from fedbpt.display import console
from fedbpt.display.console import human_bytes
from fedbpt.runs.settings import Split

NONE: Final = "–"

STATUS: Final = {
    "waiting": "waiting for devices",
    "running": "running",
    "pausing": "pausing after this round",
    "paused": "paused",
    "stopped": "stopped",
    "finished": "finished",
}
STATUS_STYLE: Final = {"waiting": "quiet", "running": "", "pausing": "warn", "paused": "warn", "stopped": "bad",
                       "finished": ""}  # fmt: skip
DEVICE_STATUS: Final = {"absent": "not there", "live": "live", "paused": "paused", "silent": "no answer",
                        "lost": "lost", "done": "done"}  # fmt: skip
DEVICE_STYLE: Final = {"absent": "quiet", "live": "", "paused": "warn", "silent": "bad", "lost": "bad",
                       "done": "quiet"}  # fmt: skip


def figure(value: float | None, generates: bool) -> str:
    """An accuracy as ``92.0 %``, a perplexity as ``7.31``."""
    if value is None:
        return NONE
    return f"{value:.2f}" if generates else f"{100 * value:.1f} %"


def gain(view: RunView) -> str:
    """What was gained over zero-shot, in points or as a change of the perplexity."""
    if view.figure is None or view.zero_shot is None:
        return ""
    change = view.figure - view.zero_shot
    return f"{change:+.2f}" if view.generates else f"{100 * change:+.1f} points"


ROWS: Final[dict[Split, str]] = {"dev": "development rows", "test": "held-out rows, which chose nothing"}


def basis(view: RunView) -> str:
    """What the figure is measured on, and how far it can be trusted."""
    if view.figure is None:
        return "not evaluated yet"
    parts = [] if view.zero_shot is None else [f"zero-shot {figure(view.zero_shot, view.generates)}"]
    parts += [] if view.interval is None else [f"95 % interval {interval(view.interval)}"]
    return " · ".join([*parts, f"{view.n_rows:,} {ROWS[view.split]}"])


def interval(bounds: tuple[float, float]) -> str:
    """``88.2 – 96.3 %``."""
    low, high = bounds
    return f"{100 * low:.1f} – {100 * high:.1f} %"


def stage_row(stage: Stage, generates: bool) -> dict[str, str]:
    """A row of the table of stages."""
    return {"title": stage.title, "dev": _measured(stage.dev, generates), "test": _measured(stage.test, generates)}


def _measured(found: Measured | None, generates: bool) -> str:
    if found is None:
        return NONE
    bounds = "" if found.interval is None else f" ({interval(found.interval)})"
    return f"{figure(found.value, generates)}{bounds}"


def duration(seconds: float | None) -> str:
    """``3:07``, ``1:02:03``."""
    return NONE if seconds is None else console.duration(seconds)


def rounds(view: RunView) -> str:
    return f"{view.searched:,}" + (f" / {view.rounds_limit:,}" if view.rounds_limit else "")


def progress(view: RunView) -> str:
    """What is being done, and how long it will take."""
    if view.status == "finished":
        return f"done in {duration(view.seconds)}"
    if view.status == "stopped":
        return "the same command resumes it"
    left = "" if view.eta_s is None else f"{duration(view.eta_s)} left"
    return " · ".join(part for part in (view.doing, left) if part)


def speed(view: RunView) -> str:
    """What all devices do together."""
    gone = ("absent", "silent", "lost")
    together = sum(device.tokens_per_second or 0.0 for device in view.devices if device.status not in gone)
    return f"{together:,.0f} tokens a second" if together else ""


def traffic(view: RunView) -> str:
    return f"{human_bytes(view.bytes_up)} up · {human_bytes(view.bytes_down)} down"


def device_row(device: DeviceView, generates: bool) -> dict[str, Any]:
    """A row of the table of devices: raw values to sort by, and their texts."""
    return {
        "name": device.name,
        "state": DEVICE_STATUS[device.status],
        "style": DEVICE_STYLE[device.status],
        "detail": device.detail,
        "speed": _number(device.tokens_per_second, " tok/s"),
        "memory": human_bytes(device.rss_bytes) if device.rss_bytes else NONE,
        "health": _health(device),
        "up": human_bytes(device.bytes_up),
        "down": human_bytes(device.bytes_down),
        "reports": device.reports,
        "figure": figure(device.figure, generates),
        "loss": _number(device.loss, "", 3),
    }


def _health(device: DeviceView) -> str:
    battery = "" if device.battery is None else f"{device.battery:.0f} %"
    celsius = "" if device.celsius is None else f"{device.celsius:.0f} °C"
    return " · ".join(part for part in (battery, celsius) if part) or NONE


def _number(value: float | None, unit: str, digits: int = 0) -> str:
    return NONE if value is None else f"{value:,.{digits}f}{unit}"
