"""Progress of a run in a notebook: a bar and figures, updated in place. Needs only IPython, no widgets."""

from __future__ import annotations

import sys
from html import escape
from types import TracebackType
from typing import Any

from fedbpt.display.console import RunDisplay
from fedbpt.plain_text import plain


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel, whose front end shows HTML."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config


def live_display(shown: bool | None) -> RunDisplay:
    """The display for this environment: a panel in a notebook, else lines on standard error. ``shown`` False: none."""
    return NotebookDisplay() if in_notebook() and shown is not False else RunDisplay(shown is not False)


def show_figures() -> None:
    """In a notebook, show matplotlib figures as images, as ``%matplotlib inline`` does."""
    if in_notebook():
        from IPython.core.pylabtools import select_figure_formats

        select_figure_formats(sys.modules["IPython"].get_ipython(), {"png"})  # type: ignore[no-untyped-call, unused-ignore]


class NotebookDisplay(RunDisplay):
    """A panel below the cell, updated in place, with important messages above the bar."""

    def __init__(self) -> None:
        super().__init__(shown=False)
        self._messages: list[tuple[str, str | None]] = []
        self._now: tuple[str, float | None, str] = ("connecting", None, "")
        self._handle: Any = None

    def __enter__(self) -> NotebookDisplay:
        from IPython.display import display

        self._handle = display(self, display_id=True)  # type: ignore[no-untyped-call, unused-ignore]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._update("done", 1.0, self._now[2])

    def _update(self, description: str, share: float | None, figures: str, left: str = "") -> None:
        self._now = (description, share, "  ".join(filter(None, (left, figures))))
        self._show()

    def _print(self, text: str, style: str | None = None) -> None:
        self._messages.append((text, style))
        self._show()

    def _show(self) -> None:
        if self._handle is not None:
            self._handle.update(self)

    def __repr__(self) -> str:
        description, share, figures = self._now
        done = "" if share is None else f"  {100 * share:.0f} %"
        return plain("\n".join([*(text for text, _ in self._messages), f"{description}{done}  {figures}"]))

    def _repr_html_(self) -> str:
        description, share, figures = self._now
        # Styles are colour names that rich and CSS share.
        lines = [f'<div style="color: {style or "inherit"}">{escape(text)}</div>' for text, style in self._messages]
        value = "" if share is None else f' value="{share:.4f}"'
        bar = f'<progress max="1"{value} style="width: 12em" aria-label="{escape(description)}"></progress>'
        lines.append(f"<div>{escape(description)} {bar} <code>{escape(figures)}</code></div>")
        return "".join(lines)
