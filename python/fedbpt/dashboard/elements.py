"""Small things of which the page is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from nicegui import ui

from fedbpt.dashboard.charts import Options
from fedbpt.dashboard.invitation import qr_svg

E = TypeVar("E", bound=ui.element)


def heading(text: str) -> ui.label:
    """The title of a part of the page."""
    return ui.label(text).classes("heading").props("role=heading aria-level=2")


def describe(element: E, text: str) -> E:
    """Say what an element is, for who does not see it. Any text will do: it is not parsed, as `Element.props` does."""
    element.props["aria-label"] = text
    return element


def chart(options: Options, style: str = "") -> ui.echart:
    """A chart, in SVG: its colours follow the page's."""
    return ui.echart(options, renderer="svg").classes(f"chart {style}")


class LateChart:
    """A chart of a panel, which appears with its first figure; until then a quiet line says what it waits for."""

    def __init__(self, options: Options, waits_for: str, style: str = "") -> None:
        self.options = options
        """To be filled; `draw` shows what has changed."""
        self._style = style
        self._chart: ui.echart | None = None
        self._place = ui.element("div")
        with self._place:
            self._waits = ui.label(waits_for).classes("waits")

    def draw(self, filled: bool) -> None:
        """Show the options as they are now, if they are ``filled``."""
        if self._chart is not None:
            self._chart.update()
        elif filled:
            self._waits.delete()
            with self._place:
                self._chart = chart(self.options, self._style)
            self.options = self._chart.options  # which is a copy


def button(text: str, icon: str, on_click: Callable[[], Any], style: str) -> ui.button:
    """A button in one of the styles ``plain``, ``main``, ``stop``; ``icon`` may be empty."""
    made = ui.button(text, icon=icon or None, on_click=on_click, color=None).classes(f"button {style}")
    return made.props("flat no-caps")


@contextmanager
def top(invitation: str | None) -> Iterator[None]:
    """The page's colours, and its bar: what is put in, then how others come to watch, and the choice of colours."""
    ui.add_css(Path(__file__).with_name("style.css").read_text(encoding="utf-8"))
    with ui.header().classes("bar"), ui.element("div").classes("inner"):
        ui.label("fedbpt").classes("brand")
        yield
        if invitation is not None:
            _invitation_button(invitation)
        _theme_button()


def _invitation_button(link: str) -> None:
    with ui.dialog() as dialog, ui.card().classes("invitation"):
        heading("Watch on your own screen")
        ui.html(qr_svg(link), sanitize=False).classes("qr").props('role="img" aria-label="QR code of the link"')
        ui.label(link).classes("link")
        button("Close", "", dialog.close, "plain")
    dialog.props('aria-label="Watch on your own screen"')
    button("Watch along", "qr_code_2", dialog.open, "plain")


def _theme_button() -> None:
    dark = ui.dark_mode(None)
    order = {
        None: (True, "dark_mode", "dark"),
        True: (False, "light_mode", "light"),
        False: (None, "contrast", "system"),
    }

    def turn() -> None:
        dark.value, switch.icon, name = order[dark.value]
        describe(switch, f"Colours: {name}. Change")

    switch = ui.button(icon="contrast", on_click=turn, color=None).props("flat round")
    describe(switch, "Colours: system. Change")
