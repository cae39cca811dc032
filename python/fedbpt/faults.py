"""The part of an error that may be sent to another machine.

For a `FedbptError` that is its ``public`` message, which quotes no row. The message of any other error may quote a row
(a TypeError shows the arguments of a call), so only its type and location are sent.
"""

from __future__ import annotations

import os
import traceback
from types import FrameType, TracebackType

from fedbpt.checking import printable
from fedbpt.errors import FedbptError


def public_reason(error: BaseException) -> str:
    """Describe ``error`` in one line that may leave this device."""
    if isinstance(error, FedbptError):
        return printable(error.public)
    kind = type(error).__name__
    if isinstance(error, OSError) and isinstance(error.errno, int):
        kind = f"{kind} ({os.strerror(error.errno)})"
    where = _place(error.__traceback__)
    return f"{kind}{f' in {where}' if where else ''}: an internal error of fedbpt, see that device's log for details"


def public_traceback(error: BaseException | None) -> str:
    """Format the traceback of ``error`` and its causes as Python does, with public messages only."""
    parts: list[str] = []
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text = f": {error.public}" if isinstance(error, FedbptError) else ""
        frames = "".join(traceback.format_tb(error.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{frames}{type(error).__name__}{text}")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n\ncaused by:\n".join(parts)


def _place(trace: TracebackType | None) -> str:
    """Module, function and line of the innermost call, and of the innermost call in fedbpt if that is another one."""
    calls = list(traceback.walk_tb(trace))
    ours = [call for call in calls if _module(call[0]).partition(".")[0] == "fedbpt"]
    places = [_named(*call) for call in (calls[-1:] + ours[-1:])]
    return ", called by ".join(dict.fromkeys(places))


def _named(frame: FrameType, line: int) -> str:
    code = frame.f_code
    return f"{_module(frame)}.{getattr(code, 'co_qualname', code.co_name)} (line {line})"


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "?"))
