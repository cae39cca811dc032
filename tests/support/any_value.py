"""Values of every kind, and what a public function may make of one: a result, or an error of ours in one line."""

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
    """A function that takes anything."""


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
    """What is wrong with how ``call`` ends with ``value`` for ``parameter``, other arguments right; None: nothing.

    An error names the parameter, or the value, or is the one that there is without it.
    """
    said = message_of(call, {**right, parameter: value})
    if said is None or (len(said.splitlines()) == 1 and _tells_of(said, parameter, value)):
        return None
    return None if said == message_of(call, right) else f"{shown(value)}: {said:.300}"


def shown(value: object) -> str:
    try:
        return f"{value!r:.60}"
    except ValueError:  # Python writes no integer of thousands of digits
        return f"a {type(value).__name__} with a long integer"


def message_of(call: Callable[..., object], arguments: dict[str, Any]) -> str | None:
    """Of the error that a call raises; of one that is not ours, after its kind, over two lines."""
    try:
        call(**arguments)
    except FedbptError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        return f"{type(error).__name__}\n{error}"
    return None


def _tells_of(said: str, parameter: str, value: object) -> bool:
    words = [word.rstrip("s") for word in parameter.split("_") if len(word) > 2] + [f" {parameter} "]
    words += ["text"] if parameter in ("cue", "tokens") else []
    words += ["row"] if parameter in ("data", "dataset", "labels") else []
    quoted = [str(value)[:60], str(Path(value))] if isinstance(value, str | Path) else []
    return any(word in said for word in words) or any(repr(text)[1:-1].strip() in said for text in quoted)
