"""`TextPieces`: a text that comes in bytes, given on in whole characters and without what stops it."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextPieces:
    """``stop``: strings that end the text; neither they nor what follows is given.

    Bytes that are no UTF-8 become U+FFFD; a character that the text breaks off in is left out.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = tuple(string for string in stop if string)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False
        """Whether a stop string came."""

    def add(self, data: bytes) -> str:
        """What can be given on now that ``data`` has come; empty after a stop string."""
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
        """What was held back, as nothing follows."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of ``text`` that ``string`` begins with."""
    most = min(len(text), len(string) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(string[:n])), 0)
