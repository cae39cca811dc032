"""Text that others wrote (a device, a task or model file, a client of a server) as text and nothing more.

A terminal obeys control characters and shows what follows a bidirectional control in another order. `plain` escapes
both as JSON does, so that JSON stays the same value. Whatever goes to a terminal passes through `echo`,
`fedbpt.display.plain_console.PlainConsole` or `PlainFormatter`.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from typing import Final

MOST_TOLD: Final = 400
"""Longest explanation that is kept of what another machine says, in characters."""

_ROOM: Final = 48  # for the note on what was cut

_OBEYED: Final = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tab and line feed, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # bidirectional marks, embeddings, overrides and isolates
    "\u200b\u2028\u2029\u2060-\u2065\u206a-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"  # separators, what is unseen
    "\ud800-\udfff"  # halves of characters, which no output can encode
    "]"
)


def plain(text: str) -> str:
    """``text`` with control characters, bidirectional controls and lone surrogates escaped, as ``\\u001b``.

    Tabs and line feeds stay. What is plain already is returned as it is.
    """
    return _OBEYED.sub(_escaped, text)


def one_line(text: str, most: int | None = None) -> str:
    """`plain` text with white space made single spaces; over ``most`` characters it is cut, and says so."""
    line = plain(" ".join(text[: None if most is None else most + 1].split()))
    if most is None or (len(text) <= most and len(line) <= most):
        return line
    return f"{line[: most - _ROOM]}… (cut from {len(text):,} characters)"


def echo(text: str, err: bool = False) -> None:
    """Print `plain` text and a line feed on standard output, or standard error, at once."""
    print(plain(text), file=sys.stderr if err else sys.stdout, flush=True)


class PlainFormatter(logging.Formatter):
    """Formats log records as `plain` text."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


def _escaped(found: re.Match[str]) -> str:
    character = found[0]
    return "\\u007f" if character == "\x7f" else json.dumps(character)[1:-1]
