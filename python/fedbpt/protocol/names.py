"""Check the names that people give to runs and devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

import msgspec

from fedbpt.decoders import from_builtins
from fedbpt.errors import ConfigError
from fedbpt.protocol.specs import Name

SUM: Final = "sum-of-devices"
"""Name of the device that a secure sum stands for."""


def check_names(names: Sequence[str], what: str) -> None:
    """Raise `ConfigError` for an invalid name, a duplicate, or no names at all. ``what``: 'run' or 'device'."""
    counts = Counter(names)
    for name, count in counts.items():
        try:
            from_builtins(name, Name)
        except msgspec.ValidationError as error:
            raise ConfigError(
                f"{name[:60]!r} cannot name a {what}: use letters, digits and ._-, at most 128 characters", field=what
            ) from error
        if count > 1:
            raise ConfigError(f"two {what}s are named {name!r}: give each its own name", field=what)
    if not names:
        raise ConfigError(f"there is no {what}: give at least one", field=what)
