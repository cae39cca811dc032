"""Standard streams as a command needs them, whatever it was started with."""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
from typing import Final

from fedbpt.display.plain_console import Unheard

_NAMES: Final = ("stdin", "stdout", "stderr")
_ESCAPED: Final = "fedbpt.escaped"  # a handler of encoding errors


def repair_streams() -> None:
    """Nothing that is printed or read costs a result that is computed already.

    A stream that is closed (``>&-``) becomes an empty one, or a database that is opened next would take its place.
    A character that standard output's encoding cannot write is escaped as JSON does, so that JSON stays the same value.
    Bytes of standard input that are no text become what `fedbpt.checking.utf8` refuses. Standard error may be gone:
    what is said there, nobody reads.
    """
    for number, name in enumerate(_NAMES):
        if getattr(sys, name) is None:
            _open_nowhere(number, name)
    codecs.register_error(_ESCAPED, _escaped)
    for stream, errors in ((sys.stdout, _ESCAPED), (sys.stdin, "surrogateescape")):
        # a locale that is not known has surrogateescape, by which ASCII still takes nothing else
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors=errors)
    if not isinstance(sys.stderr, Unheard):
        stream = sys.stderr
        sys.stderr = Unheard(lambda: stream)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def _open_nowhere(number: int, name: str) -> None:
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # it takes the lowest number that is free: this one
    setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115, PTH123
