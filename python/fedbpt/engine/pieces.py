"""`TextPieces`: decodes a stream of bytes into whole characters, up to a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextPieces:
    """Incremental UTF-8 decoder. ``stop``: strings that end the text; they and what follows are dropped.

    Invalid UTF-8 becomes U+FFFD; an incomplete character at the end is dropped.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = tuple(string for string in stop if string)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False
        """Whether a stop string was found."""

    def add(self, data: bytes) -> str:
        """Take in ``data`` and return the text that is complete so far; empty after a stop string."""
        if self.stopped:
            return ""
        text = self._held + self._decoder.decode(data)
        found = [at for at in (text.find(string) for string in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, string) for string in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """Return the text that was held back; call it when no more data follows."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, string: str) -> int:
    """Length of the longest suffix of ``text`` that is a proper prefix of ``string``."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)
