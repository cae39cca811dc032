"""HTML tables for ``_repr_html_`` in notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def html_table(caption: str, lines: Iterable[Sequence[str]]) -> str:
    """Render rows of plain-text cells; the first cell of each row is its heading."""
    body = ""
    for heading, *cells in lines:
        body += f'<tr><th style="text-align: left">{escape(heading)}</th>'
        body += "".join(f'<td style="text-align: left">{escape(cell)}</td>' for cell in cells) + "</tr>"
    return f'<table><caption style="text-align: left">{escape(caption)}</caption>{body}</table>'
