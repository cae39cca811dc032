"""Charts that compare the run with other tuning methods: its traffic, and its memory with back-propagation's."""

from __future__ import annotations

from typing import Final

from nicegui import run, ui

from fedbpt.dashboard import charts, costs
from fedbpt.dashboard.elements import DeferredChart, heading
from fedbpt.dashboard.views import RunView
from fedbpt.display.console import human_bytes

OURS: Final = "This run"


class Communication:
    """The bytes sent, and what other methods would have sent in as many rounds."""

    def __init__(self) -> None:
        self._model = ""
        self._shape: costs.ModelShape | None = None
        self._shown: tuple[object, ...] = ()
        with ui.element("section").classes("panel"):
            _heading("Communication", costs.FORMULA)
            self._chart = DeferredChart(
                charts.bars("Bytes sent, compared with other tuning methods", logarithmic=True),
                "Starts with the first round of the search.",
                "low",
            )
            self._note = ui.label().classes("note")

    def show(self, view: RunView) -> None:
        if view.model and view.model != self._model:
            self._model = view.model
            ui.timer(0.0, lambda: self._find_shape(view), once=True)
        self._draw(view)

    async def _find_shape(self, view: RunView) -> None:
        self._shape = await run.io_bound(costs.shape_of_model, view.model, view.model_fingerprint)
        self._draw(view)

    def _draw(self, view: RunView) -> None:
        sent = view.bytes_up + view.bytes_down
        if (sent, view.participations, self._shape is None) == self._shown:
            return
        self._shown = (sent, view.participations, self._shape is None)
        if not (sent and view.participations):
            return
        others = costs.bytes_of_others(self._shape, view.participations) if self._shape else {}
        charts.set_bars(self._chart.options, {OURS: sent, **others}, OURS)
        self._chart.draw(True)
        self._note.text = _ratio_note(sent, others) if others else _missing_model_note(view.model)


class Memory:
    """The devices' peak memory, and what was measured for other methods."""

    def __init__(self) -> None:
        self._shown: tuple[str, int] | None = None
        with ui.element("section").classes("panel"):
            _heading(
                "Memory",
                "Peak resident memory of a process; for this run, of its largest device. All values are measured.",
            )
            self._chart = DeferredChart(
                charts.bars("Peak memory, compared with back-propagation", logarithmic=False),
                "Starts when a device reports its memory.",
                "low",
            )
            self._note = ui.label().classes("note")

    def show(self, view: RunView) -> None:
        if (view.model, view.peak_rss_bytes) == self._shown:
            return
        self._shown = (view.model, view.peak_rss_bytes)
        if not view.peak_rss_bytes:
            return
        found = costs.memory_figures(view.model)
        others = {} if found is None else found.of_others()
        charts.set_bars(self._chart.options, {OURS: float(view.peak_rss_bytes), **others}, OURS)
        self._chart.draw(True)
        if found is None:
            self._note.text = f"No measurements for {view.model or 'this model'}: run make bench BENCH=bench_memory"
        else:
            self._note.text = f"Measured for {found.model} on {found.machine}, {found.date}: {found.how}"


def _heading(title: str, explanation: str) -> None:
    with ui.element("div").classes("row"):
        heading(title)
        with ui.element("button").classes("help").props('type="button"'):
            ui.label("How?")
            with ui.menu():
                ui.label(explanation).classes("explanation")


def _ratio_note(sent: int, others: dict[str, int]) -> str:
    name, amount = list(others.items())[1]
    return f"{name} would have sent {amount / sent:,.0f} times as much: {human_bytes(amount)}. Logarithmic scale."


def _missing_model_note(model: str) -> str:
    return f"The comparison needs the model's file on this machine: fedbpt models pull {model}" if model else ""
