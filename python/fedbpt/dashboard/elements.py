"""Small things of which the page is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nicegui import ui

from fedbpt.dashboard.charts import Options


def heading(text: str) -> ui.label:
    """The title of a part of the page."""
    return ui.label(text).classes("heading").props("role=heading aria-level=2")


def chart(options: Options, style: str = "") -> ui.echart:
    """A chart, in SVG: its colours follow the page's."""
    return ui.echart(options, renderer="svg").classes(f"chart {style}")


def button(text: str, icon: str, on_click: Callable[[], Any], style: str) -> ui.button:
    """A button in one of the styles ``plain``, ``main``, ``stop``; ``icon`` may be empty."""
    made = ui.button(text, icon=icon or None, on_click=on_click, color=None).classes(f"button {style}")
    return made.props("flat no-caps")
