"""Elements shared by the pages."""

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
    """A heading of a part of the page."""
    return ui.label(text).classes("heading").props("role=heading aria-level=2")


def describe(element: E, text: str) -> E:
    """Set the label of an element for screen readers. Safe for any text, which `Element.props` would parse."""
    element.props["aria-label"] = text
    return element


def chart(options: Options, style: str = "") -> ui.echart:
    """A chart in SVG, so that its colours follow the page's."""
    return ui.echart(options, renderer="svg").classes(f"chart {style}")


class DeferredChart:
    """A chart that appears with its first data. ``waits_for``: a text to show until then."""

    def __init__(self, options: Options, waits_for: str, style: str = "") -> None:
        self.options = options
        """Change them, then call `draw`."""
        self._style = style
        self._chart: ui.echart | None = None
        self._place = ui.element("div")
        with self._place:
            self._waits = ui.label(waits_for).classes("waits")

    def draw(self, filled: bool) -> None:
        """Show the current options; nothing before the first call with ``filled``, which means that there are data."""
        if self._chart is not None:
            self._chart.update()
        elif filled:
            self._waits.delete()
            with self._place:
                self._chart = chart(self.options, self._style)
            self.options = self._chart.options  # the chart has copied them


def button(text: str, icon: str, on_click: Callable[[], Any], style: str) -> ui.button:
    """A button. ``icon`` may be empty; ``style``: ``plain``, ``main`` or ``stop``."""
    made = ui.button(text, icon=icon or None, on_click=on_click, color=None).classes(f"button {style}")
    return made.props("flat no-caps")


@contextmanager
def page_frame(invitation: str | None) -> Iterator[None]:
    """Set up the page's styles and its bar, which gets the block's elements and the buttons for link and colours."""
    ui.add_css(Path(__file__).with_name("style.css").read_text(encoding="utf-8"))
    with ui.header().classes("bar"), ui.element("div").classes("inner"):
        ui.label("fedbpt").classes("brand")
        yield
        if invitation is not None:
            _invitation_button(invitation)
        _theme_button()


def _invitation_button(link: str) -> None:
    with ui.dialog() as dialog, ui.card().classes("invitation"):
        heading("Watch on your own device")
        ui.html(qr_svg(link), sanitize=False).classes("qr").props('role="img" aria-label="QR code of the link"')
        ui.label(link).classes("link")
        button("Close", "", dialog.close, "plain")
    dialog.props('aria-label="Watch on your own device"')
    button("Watch along", "qr_code_2", dialog.open, "plain")


def _theme_button() -> None:
    dark = ui.dark_mode(None)
    order = {
        None: (True, "dark_mode", "dark"),
        True: (False, "light_mode", "light"),
        False: (None, "contrast", "system"),
    }

    def change() -> None:
        dark.value, switch.icon, name = order[dark.value]
        describe(switch, f"Colours: {name}. Change")

    switch = ui.button(icon="contrast", on_click=change, color=None).props("flat round")
    describe(switch, "Colours: system. Change")
