"""Both models' replies side by side in a terminal: bars of label probabilities, or texts while they are generated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.bar import Bar
from rich.cells import cell_len
from rich.console import RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fedbpt.display.plain_console import PlainConsole
from fedbpt.plain_text import plain
from fedbpt.side_by_side.sides import SIDES, Probabilities, Side

_MIN_BAR_WIDTH = 8
_MAX_BAR_WIDTH = 24
_FIGURE_WIDTH = 8


def print_probabilities(console: PlainConsole, labels: Sequence[str], found: Probabilities, label: str | None) -> None:
    """Print a line per label. ``label``: the row's correct label; None: unknown."""
    table = Table(box=None, padding=(0, 1))
    table.add_column("", no_wrap=True)
    room = (console.width - max(cell_len(plain(label)) for label in labels) - 2) // len(SIDES) - _FIGURE_WIDTH - 4
    bar = min(max(room, _MIN_BAR_WIDTH), _MAX_BAR_WIDTH)
    for side in SIDES:
        table.add_column(side, justify="right", no_wrap=True, min_width=_FIGURE_WIDTH)
        table.add_column("", width=bar)
    for i, name in enumerate(labels):
        cells: list[RenderableType] = [name]
        for side in SIDES:
            values: tuple[float, ...] = getattr(found, side)
            style = "bold" if values[i] == max(values) else ""
            cells += [Text(f"{values[i]:.1%}", style), Bar(1.0, 0.0, values[i], width=bar)]
        table.add_row(*cells)
    console.print(table)
    if label is not None:
        console.print(f"correct label: {label}", style="dim", highlight=False)


def print_texts(console: PlainConsole, pieces: Iterator[tuple[Side, str]]) -> dict[Side, str]:
    """Print both texts while they are generated; return them when complete."""
    texts: dict[Side, str] = dict.fromkeys(SIDES, "")
    with Live(_panels(texts), console=console, refresh_per_second=10, vertical_overflow="visible") as live:
        for side, piece in pieces:
            texts[side] += piece
            live.update(_panels(texts))
    return texts


def _panels(texts: dict[Side, str]) -> Table:
    table = Table.grid(expand=True)
    for _ in texts:
        table.add_column(ratio=1)
    table.add_row(*(Panel(Text(plain(text.strip("\n"))), title=Text(side)) for side, text in texts.items()))
    return table
