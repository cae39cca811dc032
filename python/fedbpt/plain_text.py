"""Escaping of untrusted text (from a device, a task or model file, a client of a server) before it is shown.

A terminal acts on control characters, and bidirectional controls reorder what follows them. `plain` escapes both as
JSON does, so that JSON keeps its value. All output to a terminal passes through `echo`,
`fedbpt.display.plain_console.PlainConsole` or `PlainFormatter`.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from typing import Final

MOST_TOLD: Final = 400
"""Length that an explanation from another machine is cut to, in characters."""

_CUT_NOTE_CHARS: Final = 48

_UNSAFE: Final = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 except tab and line feed, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # bidirectional marks, embeddings, overrides and isolates
    "\u200b\u2028\u2029\u2060-\u2065\u206a-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"  # separators, invisible
    "\ud800-\udfff"  # surrogates, which cannot be encoded
    "]"
)


def plain(text: str) -> str:
    """``text`` with control characters, bidirectional controls and lone surrogates escaped, as ``\\u001b``.

    Tabs and line feeds stay. Applying it twice changes nothing more.
    """
    return _UNSAFE.sub(_escaped, text)


def one_line(text: str, most: int | None = None) -> str:
    """`plain` text with white space collapsed to single spaces; text over ``most`` characters is cut, with a note."""
    line = plain(" ".join(text[: None if most is None else most + 1].split()))
    if most is None or (len(text) <= most and len(line) <= most):
        return line
    return f"{line[: most - _CUT_NOTE_CHARS]}… (cut from {len(text):,} characters)"


def echo(text: str, err: bool = False) -> None:
    """Print `plain` text and a line feed on standard output, or on standard error, and flush."""
    print(plain(text), file=sys.stderr if err else sys.stdout, flush=True)


class PlainFormatter(logging.Formatter):
    """Formats log records as `plain` text."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


def _escaped(found: re.Match[str]) -> str:
    character = found[0]
    return "\\u007f" if character == "\x7f" else json.dumps(character)[1:-1]
