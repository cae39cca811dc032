"""The user's folders. Some users have no home, such as a container's that runs under a bare user id."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from fedbpt.errors import ConfigError

OTHER_CACHE: Final = "set FEDBPT_CACHE to another folder"
"""The remedy for a cache folder that cannot be written."""


def home(remedy: str) -> Path:
    """The user's home folder. Raises `ConfigError`, which ends with ``remedy``, if the system has none."""
    try:
        return Path.home()
    except RuntimeError as error:
        raise ConfigError(f"user {os.getuid()} has no home folder: {remedy}") from error


def expanded(path: str | os.PathLike[str]) -> Path:
    """Expand a leading ``~`` or ``~user``. Raises `ConfigError` if there is no such home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"no home folder for {os.fspath(path)!r}: give the full path") from error


def cache_folder() -> Path:
    """The folder for downloads: ``$FEDBPT_CACHE``, else in the platform's cache folder. May not exist yet.

    Raises `ConfigError` if neither is known.
    """
    if chosen := os.environ.get("FEDBPT_CACHE"):
        return expanded(chosen)
    remedy = "set FEDBPT_CACHE to a folder for models"
    if sys.platform == "darwin":
        return home(remedy) / "Library" / "Caches" / "fedbpt"
    return Path(os.environ.get("XDG_CACHE_HOME") or home(remedy) / ".cache") / "fedbpt"


def config_folder(remedy: str) -> Path:
    """The user's configuration folder; ``remedy`` as for `home`. May not exist yet."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or home(remedy) / ".config")
