"""The user's folders. Some users have no home: a container's, say, that runs as a number without an account."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from fedbpt.errors import ConfigError

OTHER_CACHE: Final = "set FEDBPT_CACHE to another folder"
"""What to do about a cache folder that cannot be written."""


def home(instead: str) -> Path:
    """The user's home. Raises `ConfigError` where the system names none; ``instead`` says what to do then."""
    try:
        return Path.home()
    except RuntimeError as error:
        raise ConfigError(f"this user ({os.getuid()}) has no home folder: {instead}") from error


def expanded(path: str | os.PathLike[str]) -> Path:
    """``path`` with ``~`` and ``~user`` at its beginning replaced. Raises `ConfigError` where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{os.fspath(path)!r} names a home folder that there is not: give the whole path") from error


def cache_folder() -> Path:
    """Where fedbpt keeps what it fetched: ``$FEDBPT_CACHE``, else the platform's cache folder. May not exist yet.

    Raises `ConfigError` where neither is known.
    """
    if chosen := os.environ.get("FEDBPT_CACHE"):
        return expanded(chosen)
    instead = "set FEDBPT_CACHE to a folder where fedbpt may keep models"
    if sys.platform == "darwin":
        return home(instead) / "Library" / "Caches" / "fedbpt"
    return Path(os.environ.get("XDG_CACHE_HOME") or home(instead) / ".cache") / "fedbpt"


def config_folder(instead: str) -> Path:
    """The user's configuration folder; ``instead`` as for `home`. May not exist yet."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or home(instead) / ".config")
