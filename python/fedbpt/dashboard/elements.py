"""Small things of which the page is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from nicegui import ui

from fedbpt.dashboard.charts import Options

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


def button(text: str, icon: str, on_click: Callable[[], Any], style: str) -> ui.button:
    """A button in one of the styles ``plain``, ``main``, ``stop``; ``icon`` may be empty."""
    made = ui.button(text, icon=icon or None, on_click=on_click, color=None).classes(f"button {style}")
    return made.props("flat no-caps")


@contextmanager
def top() -> Iterator[None]:
    """The page's colours, and its bar: what is put in, then the choice of colours."""
    ui.add_css(Path(__file__).with_name("style.css").read_text(encoding="utf-8"))
    with ui.header().classes("bar"), ui.element("div").classes("inner"):
        ui.label("fedbpt").classes("brand")
        yield
        _theme_button()


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
