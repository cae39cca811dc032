"""`check_names`: whether people's names for runs and devices can cross the wire."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from fedbpt.errors import ConfigError
from fedbpt.protocol.specs import Name


def check_names(names: Sequence[str], what: str) -> None:
    """Raises `ConfigError` for a name that messages cannot hold, one that is there twice, or none at all."""
    counts = Counter(names)
    for name, count in counts.items():
        try:
            msgspec.convert(name, Name)
        except msgspec.ValidationError as error:
            raise ConfigError(
                f"{name[:60]!r} cannot name a {what}: use letters, digits and ._- (at most 128)"
            ) from error
        if count > 1:
            raise ConfigError(f"two {what}s are named {name!r}: give each its own name")
    if not names:
        raise ConfigError(f"a run needs at least one {what}")
