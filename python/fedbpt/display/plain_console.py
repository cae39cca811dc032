"""`PlainConsole`: a rich console for untrusted text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from fedbpt.plain_text import plain


class BestEffortStream:
    """A text stream that ignores write errors, such as a closed pipe or a full disk, so that work continues.

    ``stream``: returns the stream to write to; None: it is closed.
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
    """A console that ignores markup and emoji codes in strings and makes all text `fedbpt.plain_text.plain`.

    Set styles by arguments or with `rich.text.Text`.
    """

    def __init__(self, **options: Any) -> None:
        if options.get("stderr"):
            options["file"] = BestEffortStream(lambda: sys.stderr)
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(plain(text), **options)  # before rich measures its width

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=plain(segment.text))
