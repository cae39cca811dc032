"""Standard streams that work whatever the command was started with."""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
from typing import Final

from fedbpt.display.plain_console import BestEffortStream

_NAMES: Final = ("stdin", "stdout", "stderr")
_JSON_ESCAPE: Final = "fedbpt.escaped"  # name of our handler of encoding errors


def repair_streams() -> None:
    """Make standard streams tolerant, so that printing or reading never loses a computed result.

    - A closed stream (``>&-``) is opened on the null device: else the next opened file would take its descriptor.
    - Characters that standard output cannot encode are escaped as in JSON, which keeps JSON output equivalent.
    - Undecodable bytes of standard input become surrogates, which `fedbpt.checking.utf8` rejects.
    - Errors while writing to standard error are ignored.
    """
    for number, name in enumerate(_NAMES):
        if getattr(sys, name) is None:
            _open_null(number, name)
    codecs.register_error(_JSON_ESCAPE, _escape_as_json)
    for stream, errors in ((sys.stdout, _JSON_ESCAPE), (sys.stdin, "surrogateescape")):
        # Python sets surrogateescape in an unknown locale, where ASCII output would still fail on other characters.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors=errors)
    if not isinstance(sys.stderr, BestEffortStream):
        stream = sys.stderr
        sys.stderr = BestEffortStream(lambda: stream)


def _escape_as_json(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def _open_null(number: int, name: str) -> None:
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which is ``number``
    setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115, PTH123
