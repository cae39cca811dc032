"""ECharts options for the dashboard, as plain dictionaries. Colours are CSS variables of ``style.css``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

from fedbpt.dashboard.views import Point
from fedbpt.display.console import human_bytes

Options: TypeAlias = dict[str, Any]
Curve: TypeAlias = tuple[Sequence[Point], str, float]
"""Points, colour, width in pixels."""

MAX_POINTS: Final = 200
"""Maximum number of points of a device's curve; ECharts thins the run's own curves (``sampling``)."""

MAX_MARKED_POINTS: Final = 40
"""Maximum number of points of a curve with a marker on each."""

MAX_LEGEND_DEVICES: Final = 8
"""Maximum number of devices with a legend, so that it fits a phone."""

_DEVICE_COLOURS: Final = tuple(f"var(--device-{i})" for i in range(8))
_FONT: Final = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif'
_TEXT: Final = {"color": "var(--muted)", "fontFamily": _FONT, "fontSize": 12}


def curve(description: str, unit: str) -> Options:
    """An empty chart of values by round, to be filled by `set_curves`. ``unit``: follows each value, such as `` %``."""
    return {
        "aria": {"enabled": True, "label": {"description": description}},
        "animationDuration": 300,
        "animationDurationUpdate": 300,
        "grid": {"left": 8, "right": 20, "top": 36, "bottom": 8, "containLabel": True},
        "textStyle": _TEXT,
        "legend": {"top": 0, "left": 0, "itemWidth": 18, "itemHeight": 10, "textStyle": _TEXT, "icon": "roundRect"},
        "tooltip": {**_tooltip(), "trigger": "axis"},
        "xAxis": {
            "type": "value",
            "min": 0,
            "max": "dataMax",
            "minInterval": 1,
            "axisLabel": {**_TEXT, "showMaxLabel": False},
            "axisLine": {"lineStyle": {"color": "var(--grid)"}},
            "splitLine": {"show": False},
        },
        "yAxis": {
            "type": "value",
            "scale": True,
            "boundaryGap": ["5%", "5%"],
            "axisLabel": {**_TEXT, "formatter": "{value}" + unit, "showMinLabel": False, "showMaxLabel": False},
            "splitLine": {"lineStyle": {"color": "var(--grid)"}},
        },
        "series": [],
    }


def set_curves(options: Options, curves: Mapping[str, Curve], zero_shot: float | None) -> None:
    """Fill ``options`` with ``curves``, by name, and a horizontal line at ``zero_shot``."""
    options["series"] = [_line(name, points, colour, width) for name, (points, colour, width) in curves.items()]
    if zero_shot is not None and options["series"]:
        options["series"][0]["markLine"] = {
            "silent": True,
            "symbol": "none",
            "animation": False,
            "lineStyle": {"color": "var(--zero)", "type": "dashed", "width": 2},
            "label": {**_TEXT, "formatter": "zero-shot", "position": "insideEndTop"},
            "data": [{"yAxis": round(zero_shot, 4)}],
        }
        values = [zero_shot, *(point.value for points, _, _ in curves.values() for point in points)]
        low, high = min(values), max(values)
        pad = (high - low) * 0.08 or abs(zero_shot) * 0.05 or 1.0
        options["yAxis"]["min"] = _round_to_3_digits(low - pad)
        options["yAxis"]["max"] = _round_to_3_digits(high + pad)


def set_devices(options: Options, curves: Mapping[str, Sequence[Point]]) -> None:
    """Fill ``options`` with a thin curve for each device."""
    options["legend"]["show"] = len(curves) <= MAX_LEGEND_DEVICES
    options["legend"]["type"] = "scroll"
    options["tooltip"]["trigger"] = "axis" if len(curves) <= MAX_LEGEND_DEVICES else "item"
    options["series"] = [
        _line(name, thinned(points), _DEVICE_COLOURS[i % len(_DEVICE_COLOURS)], 1.5)
        for i, (name, points) in enumerate(curves.items())
    ]


def bars(description: str, logarithmic: bool) -> Options:
    """An empty chart of sizes in bytes, to be filled by `set_bars`."""
    return {
        "aria": {"enabled": True, "label": {"description": description}},
        "animationDuration": 300,
        "grid": {"left": 0, "right": 76, "top": 4, "bottom": 4, "containLabel": True},
        "textStyle": _TEXT,
        "xAxis": {"type": "log" if logarithmic else "value", "show": False, "min": 0},
        "yAxis": {
            "type": "category",
            "inverse": True,
            "axisLabel": {**_TEXT, "width": 120, "overflow": "break", "lineHeight": 15},
            "axisLine": {"show": False},
            "axisTick": {"show": False},
            "data": [],
        },
        "series": [],
    }


def set_bars(options: Options, amounts: Mapping[str, float], ours: str) -> None:
    """Fill ``options`` with ``amounts`` in bytes, by name; the bar named ``ours`` is highlighted."""
    options["yAxis"]["data"] = list(amounts)
    if options["xAxis"]["type"] == "log":  # has no zero: begin the axis at a third of the smallest value
        options["xAxis"]["min"] = max(min(amounts.values(), default=1.0) / 3, 0.1)
    data = [
        {
            "value": max(amount, 0.1),
            "name": human_bytes(amount),
            "itemStyle": {"color": "var(--tuned)" if name == ours else "var(--other)", "borderRadius": 4},
        }
        for name, amount in amounts.items()
    ]
    label = {**_TEXT, "show": True, "position": "right", "formatter": "{b}", "fontWeight": 600}
    options["series"] = [{"type": "bar", "barMaxWidth": 22, "silent": True, "label": label, "data": data}]


def thinned(points: Sequence[Point], max_points: int = MAX_POINTS) -> list[Point]:
    """At most ``max_points`` of ``points``, evenly spaced, including the first and the last."""
    if len(points) <= max_points:
        return list(points)
    return [points[round(i * (len(points) - 1) / (max_points - 1))] for i in range(max_points)]


def _line(name: str, points: Sequence[Point], colour: str, width: float) -> Options:
    return {
        "id": name,
        "name": name,
        "type": "line",
        "sampling": "lttb",
        "showSymbol": len(points) <= MAX_MARKED_POINTS,
        "symbolSize": 5,
        "emphasis": {"disabled": True},
        "lineStyle": {"color": colour, "width": width},
        "itemStyle": {"color": colour},
        "data": [[point.round, round(point.value, 4)] for point in points],
    }


def _tooltip() -> Options:
    return {
        "confine": True,
        "backgroundColor": "var(--card)",
        "borderColor": "var(--grid)",
        "textStyle": {"color": "var(--ink)", "fontSize": 13},
    }


def _round_to_3_digits(value: float) -> float:
    return float(f"{value:.3g}")
