"""Arbitrary values, and a check that a public function returns a result or raises a one-line `FedbptError` for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from fedbpt.errors import FedbptError


def ignored(*_arguments: object) -> None:
    """Accept any arguments."""


NUMBERS: tuple[Any, ...] = (
    *(-1, 0, 1, 3, 2**31, 2**63, 2**64, 10**30, 10**400, 10**5000, -(10**30)),
    *(0.5, -0.5, 1e-300, 1e30, 1e300, math.nan, math.inf, -math.inf, 3j, Fraction(1, 3), Decimal("NaN"), Decimal(2)),
    *(np.int64(-3), np.uint64(2**64 - 1), np.float32(0.5), np.float64("nan"), np.bool_(True), True),
)
TEXTS: tuple[Any, ...] = (
    "",
    " ",
    "absent",
    "~nobody-of-that-name/file",
    "a\0b",
    "half \ud800",
    "../" * 9,
    "long" * 2000,
    "/",
    "é" * 200,
    b"bytes",
)
OTHERS: tuple[Any, ...] = (
    *(
        None,
        [("a text", 10**5000)],
        ({"a": 10**5000},),
        [],
        [None],
        [""],
        ["a", 1],
        [[1], [1, 2]],
        {},
        {"text": 1},
        {1: 2},
        (),
        set(),
        iter(()),
        object(),
        ignored,
    ),
    *(np.array(1), np.array([1.5, np.nan]), np.array(["x"]), np.zeros((2, 0)), Path("absent/file"), Path("/")),
)
VALUES = (*NUMBERS, *TEXTS, *OTHERS)


def fault_of(call: Callable[..., object], right: dict[str, Any], parameter: str, value: object) -> str | None:
    """Call with ``value`` for ``parameter`` and otherwise valid arguments; returns what is wrong, or None.

    An error must name the parameter or the value, or also occur with valid arguments.
    """
    message = message_of(call, {**right, parameter: value})
    if message is None or (len(message.splitlines()) == 1 and _names(message, parameter, value)):
        return None
    return None if message == message_of(call, right) else f"{shown(value)}: {message:.300}"


def shown(value: object) -> str:
    try:
        return f"{value!r:.60}"
    except ValueError:  # Python does not format integers of thousands of digits
        return f"a {type(value).__name__} with a long integer"


def message_of(call: Callable[..., object], arguments: dict[str, Any]) -> str | None:
    """The message of the `FedbptError` that a call raises; of another exception two lines, type first. Else None."""
    try:
        call(**arguments)
    except FedbptError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - such exceptions are what the tests look for
        return f"{type(error).__name__}\n{error}"
    return None


def _names(message: str, parameter: str, value: object) -> bool:
    words = [word.rstrip("s") for word in parameter.split("_") if len(word) > 2] + [f" {parameter} "]
    words += ["text"] if parameter in ("cue", "tokens") else []
    words += ["row"] if parameter in ("data", "dataset", "labels") else []
    quoted = [str(value)[:60], str(Path(value))] if isinstance(value, str | Path) else []
    return any(word in message for word in words) or any(repr(text)[1:-1].strip() in message for text in quoted)
