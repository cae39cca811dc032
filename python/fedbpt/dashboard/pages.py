"""The run's page: NiceGUI components that show a `RunState`. Each part is built once, then updated where it changed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final, Protocol

from nicegui import ui

from fedbpt.coordinator.control import RunControl
from fedbpt.dashboard import charts, texts
from fedbpt.dashboard.comparison_charts import Communication, Memory
from fedbpt.dashboard.controls import Controls
from fedbpt.dashboard.elements import DeferredChart, heading, page_frame
from fedbpt.dashboard.state import RunState
from fedbpt.dashboard.views import Point, RunView, Stage
from fedbpt.display.console import STAGE_NAMES, human_bytes
from fedbpt.runs.dev_figures import DevPoint
from fedbpt.runs.events import RunStage

POLL_S: Final = 0.25
"""Interval at which a page checks for urgent changes, such as a lost device, in seconds."""

UPDATE_S: Final = 1.0
"""Minimum time between two updates without an urgent change, in seconds."""


class Part(Protocol):
    """A part of the page."""

    def show(self, view: RunView) -> None: ...


class RunPage:
    """The run's page in one browser.

    Args:
        invitation: the read-only link for others; None: there is none.
        other: title and path of the page that its bar links to.
    """

    def __init__(
        self,
        state: RunState,
        control: RunControl | None,
        invitation: str | None,
        other: tuple[str, str] = ("Compare", "/compare"),
    ) -> None:
        self._state = state
        self._version = -1
        self._urgent: tuple[object, ...] = ()
        self._updated = 0.0
        view = state.view()
        with page_frame(invitation):
            self._heading = Heading(view, other)
            ui.element("div").classes("spring")
            self._controls = Controls(control)
        self._parts: list[Part] = [Story(), Tiles(), Curves(state), Stages(), Devices(state)]
        with ui.element("div").classes("pair"):
            self._parts += [Communication(), Memory()]
        self._parts.append(Notices())
        self.update()
        ui.timer(POLL_S, self.update)

    def update(self) -> None:
        """Show changes, if they are urgent or an update is due."""
        now = time.monotonic()
        state = self._state
        due = state.version != self._version and now - self._updated >= UPDATE_S
        if not (due or state.urgent != self._urgent):
            return
        self._version = state.version
        self._urgent = state.urgent
        self._updated = now
        view = state.view()
        self._heading.show(view)
        self._controls.show(view)
        for part in self._parts:
            part.show(view)


class Heading:
    def __init__(self, view: RunView, other: tuple[str, str]) -> None:
        with ui.element("div"):
            ui.label(view.run).classes("title").props("role=heading aria-level=1")
            self._what = ui.label().classes("what")
        self._status = ui.label().classes("state").props('role="status"')
        ui.label("Run").classes("tab here").props('aria-current="page"')
        ui.link(*other).classes("tab")

    def show(self, view: RunView) -> None:
        known = (view.task, view.model and f"on {view.model}", f"method {view.method}")
        self._what.text = " · ".join(part for part in known if part) if view.task else "not started"
        self._status.text = texts.state(view)
        self._status.classes(replace=f"state {texts.STATUS_STYLE[view.status]}")


class Story:
    """What the run does, in a sentence, and its progress through the stages."""

    def __init__(self) -> None:
        self._stages: dict[RunStage, ui.label] = {}
        with ui.element("section").classes("panel story"):
            self._sentence = ui.label().classes("sentence")
            self._path = ui.element("div").classes("path").props('role="list" aria-label="Stages"')

    def show(self, view: RunView) -> None:
        self._sentence.text = texts.sentence(view)
        if tuple(self._stages) != view.path:
            self._path.clear()
            with self._path:
                self._stages = {stage: ui.label(STAGE_NAMES[stage]).props("role=listitem") for stage in view.path}
        now = len(view.path) if view.status == "finished" else -1
        if view.stage in view.path:
            now = view.path.index(view.stage)
        for i, step in enumerate(self._stages.values()):
            step.classes(replace="step" + (" past" if i < now else " now" if i == now else ""))


class Tile:
    """A number with a label above it and explanations below."""

    def __init__(self, label: str, style: str = "") -> None:
        with ui.element("section").classes(f"panel tile {style}"):
            self.label = ui.label(label).classes("label")
            self.big = ui.label(texts.NONE).classes("big")
            self.gain = ui.label().classes("small gain")
            self.small = ui.label().classes("small")


class Tiles:
    """The main figures."""

    def __init__(self) -> None:
        with ui.element("div").classes("tiles"):
            self._figure = Tile("Accuracy", "hero")
            self._round = Tile("Rounds", "wide")
            with self._round.gain:
                self._bar = ui.linear_progress(0.0, show_value=False, size="8px", color=None).props(
                    'aria-label="Budget spent"'
                )
            self._devices = Tile("Devices")
            self._sent = Tile("Total traffic")

    def show(self, view: RunView) -> None:
        self._figure.label.text = "Perplexity" if view.generates else "Accuracy"
        self._figure.big.text = texts.figure(view.figure, view.generates)
        self._figure.gain.text = " · ".join(filter(None, (texts.gain(view), texts.confidence(view))))
        self._figure.small.text = texts.basis(view)
        self._round.big.text = texts.rounds(view)
        self._bar.value = round(view.share, 3)
        known = (texts.progress(view), f"{view.evaluations:,} evaluations" if view.evaluations else "")
        self._round.small.text = " · ".join(filter(None, known))
        finished = view.status == "finished"
        self._devices.big.text = f"{len(view.devices)}" if finished else f"{view.live} / {len(view.devices)}"
        self._devices.gain.text = "took part" if finished else "live"
        self._devices.small.text = texts.speed(view)
        sent = view.bytes_up + view.bytes_down
        self._sent.big.text = human_bytes(sent) if sent else texts.NONE
        self._sent.gain.text = texts.traffic(view) if sent else ""
        self._sent.small.text = "by all devices" if view.epsilon is None else f"privacy spent: ε = {view.epsilon:.2f}"


class Curves:
    """Accuracy and loss by round, against the zero-shot line."""

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._shown: tuple[list[DevPoint], list[Point]] | None = None
        with ui.element("div").classes("pair"):
            with ui.element("section").classes("panel"):
                self._title = heading("Accuracy on development rows")
                self._figure = DeferredChart(
                    charts.curve("Accuracy by round, against the zero-shot line", " %"),
                    "Starts once the template is selected, if devices have development rows.",
                )
            with ui.element("section").classes("panel"):
                heading("Loss, nats")
                self._loss = DeferredChart(
                    charts.curve("Loss by round, against the zero-shot line", ""),
                    "Starts with the first evaluation or the first round of the search.",
                )

    def show(self, view: RunView) -> None:
        generates = view.generates
        found = self._state.dev_points()
        losses = self._state.losses()
        if self._shown == (found, losses):
            return
        self._shown = (found, losses)
        figures = [Point(point.round, point.figure) for point in found]
        dev = [Point(point.round, point.loss) for point in found]
        if generates:
            self._title.text = "Perplexity on development rows"
            self._figure.options["yAxis"]["axisLabel"]["formatter"] = "{value}"
        else:
            figures = [Point(round, 100 * value) for round, value in figures]
        scale = 1 if generates else 100
        zero = None if not found or found[-1].zero_shot is None else scale * found[-1].zero_shot
        charts.set_curves(self._figure.options, {"tuned": (figures, "var(--tuned)", 3)}, zero)
        zero = found[-1].zero_shot_loss if found else None
        # With differential privacy, mini-batch losses are noise around 0.
        batches = {"mini-batches": (losses, "var(--other)", 1.2)} if view.epsilon is None else {}
        charts.set_curves(self._loss.options, {"development rows": (dev, "var(--loss)", 3), **batches}, zero)
        self._figure.draw(bool(figures))
        self._loss.draw(bool(dev or (losses and batches)))


class Stages:
    """The result of each step of the run: the table that the terminal prints at the end."""

    def __init__(self) -> None:
        self._rows: list[dict[str, str]] = []
        with ui.element("section").classes("panel") as self._panel:
            heading("Results by step")
            with ui.element("div").classes("scroller").props('tabindex=0 role="region" aria-label="Results by step"'):
                self._table = ui.table(columns=[], rows=[], row_key="title", pagination=0)
            self._table.props('flat hide-bottom wrap-cells :dense="Quasar.Screen.lt.md"')
        self._panel.visible = False

    def show(self, view: RunView) -> None:
        rows = [texts.stage_row(stage, view.generates) for stage in view.stages]
        if rows == self._rows:
            return
        self._rows = rows
        self._panel.visible = bool(rows)
        self._table.columns = [
            {"name": "title", "label": "Step", "field": "title", "align": "left"},
            *_splits(view.stages),
        ]
        self._table.rows = rows


def _splits(stages: Sequence[Stage]) -> list[dict[str, str]]:
    """A table column for each split that was evaluated, labelled with its number of rows."""
    columns = []
    for split, name in texts.ROWS.items():
        counts = {found.n for stage in stages if (found := getattr(stage, split)) is not None}
        if counts:
            label = f"{max(counts):,} {name}"
            columns.append({"name": split, "label": label, "field": split, "align": "right"})
    return columns


_COLUMNS: Final = (
    ("name", "Device"),
    ("state", "State"),
    ("figure", "Accuracy"),
    ("loss", "Loss"),
    ("speed", "Speed"),
    ("memory", "Memory"),
    ("health", "Battery, °C"),
    ("up", "Sent"),
    ("down", "Received"),
    ("reports", "Rounds"),
)

_STATE_CELL: Final = """
<q-td :props="props"><span class="state" :class="props.row.style">{{ props.row.state }}</span>
<span class="what">{{ props.row.detail }}</span></q-td>
"""

_CARD: Final = """
<div class="col-12 col-sm-6" style="padding: 4px"><div class="device">
<div class="row"><strong>{{ props.row.name }}</strong><span style="flex: 1"></span>
<span class="state" :class="props.row.style">{{ props.row.state }}</span></div>
<div class="what" v-if="props.row.detail">{{ props.row.detail }}</div>
<dl><div v-for="col in props.cols.slice(2)" :key="col.name" :class="col.name">
<dt>{{ col.label }}</dt><dd>{{ col.value }}</dd></div></dl>
</div></div>
"""


def _columns(health: bool) -> list[dict[str, str]]:
    """The table's columns. ``health``: include battery and temperature."""
    return [
        {"name": name, "label": label, "field": name, "align": "left" if name in ("name", "state") else "right"}
        for name, label in _COLUMNS
        if health or name != "health"
    ]


class Devices:
    """The devices in a table, and their curves in a chart."""

    def __init__(self, state: RunState) -> None:
        self._state = state
        self._rows: list[object] = []
        self._counts: list[int] = []
        with ui.element("section").classes("panel"):
            heading("Devices")
            with ui.element("div").classes("scroller").props('tabindex=0 role="region" aria-label="All devices"'):
                self._table = ui.table(columns=_columns(False), rows=[], row_key="name", pagination=0)
            self._table.props('flat hide-bottom :grid="Quasar.Screen.lt.md"')
            self._table.add_slot("body-cell-state", _STATE_CELL)
            self._table.add_slot("item", _CARD)
        with ui.element("section").classes("panel"):
            with ui.element("div").classes("row"):
                heading("By device")
                ui.element("div").classes("spring")
                self._which = ui.toggle({"figure": "accuracy", "loss": "loss"}, value="loss", on_change=self._draw)
                self._which.props('no-caps flat toggle-color="" color="" aria-label="Curve"').classes("which")
            self._which.visible = False  # until there are both curves
            self._chart = DeferredChart(
                charts.curve("A curve for each device, by round", ""), "Starts with the first round."
            )

    def show(self, view: RunView) -> None:
        problems_first = sorted(view.devices, key=lambda device: device.status not in ("silent", "lost", "absent"))
        rows = [texts.device_row(device, view.generates) for device in problems_first]
        if rows != self._rows:
            self._rows = list(rows)
            self._table.columns = _columns(any(row["health"] != texts.NONE for row in rows))
            self._table.rows = rows
        if not self._which.visible:
            evaluated = any(self._state.device_figures(device.name) for device in view.devices)
            self._which.visible = evaluated
            self._which.value = "figure" if evaluated else "loss"
        counts = [len(self._curve(device.name)) for device in view.devices]
        if counts != self._counts:
            self._counts = counts
            self._draw()

    def _curve(self, name: str) -> list[Point]:
        if self._which.value == "loss":
            return self._state.device_losses(name)
        scale = 1 if self._state.generates else 100
        return [Point(round, scale * value) for round, value in self._state.device_figures(name)]

    def _draw(self) -> None:
        percent = self._which.value == "figure" and not self._state.generates
        self._chart.options["yAxis"]["axisLabel"]["formatter"] = "{value} %" if percent else "{value}"
        names = [device.name for device in self._state.view().devices]
        curves = {name: self._curve(name) for name in names}
        charts.set_devices(self._chart.options, curves)
        self._chart.draw(any(curves.values()))


class Notices:
    """Messages about the run, the latest first."""

    def __init__(self) -> None:
        with ui.element("section").classes("panel"):
            heading("Messages")
            self._list = ui.element("div").classes("notices").props('tabindex=0 role="log" aria-label="Messages"')
        self._shown: tuple[object, ...] | None = None

    def show(self, view: RunView) -> None:
        if view.notices == self._shown:
            return
        self._shown = view.notices
        self._list.clear()
        with self._list:
            for notice in view.notices:
                with ui.element("div"):
                    ui.label(notice.time[11:19]).classes("time").style("display: inline")
                    ui.label(notice.text).classes("bad" if notice.bad else "").style("display: inline")
            if not view.notices:
                ui.label("No messages.").classes("what")
