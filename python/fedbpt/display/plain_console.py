"""`PlainConsole`: rich's console for text that others wrote."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from fedbpt.plain_text import plain


class Unheard:
    """A stream whose reader may be gone, or its disk full: what is told there goes on unheard, and so does the work.

    ``stream``: what is written to; it may return None, for a stream that is closed.
    """

    def __init__(self, stream: Callable[[], TextIO | None]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            if (stream := self._stream()) is not None:
                stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            if (stream := self._stream()) is not None:
                stream.flush()

    def isatty(self) -> bool:
        stream = self._stream()
        return stream is not None and stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream(), name)


class PlainConsole(Console):
    """A console that takes no markup and no emoji codes from strings, and whose text is `fedbpt.plain_text.plain`.

    Styles are given as arguments, or by `rich.text.Text`.
    """

    def __init__(self, **options: Any) -> None:
        if options.get("stderr"):
            options["file"] = Unheard(lambda: sys.stderr)
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(plain(text), **options)  # before it is measured

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=plain(segment.text))
