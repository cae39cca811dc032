"""A run's figures as TensorBoard's event files, by tensorboardX (``fedbpt[tensorboard]``)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from fedbpt.errors import ConfigError, MissingExtraError
from fedbpt.runs.store import RoundHistory


def write_scalars(history: Sequence[RoundHistory], folder: Path) -> Path:
    """Every figure of every round as a scalar of its name, the round its step; returns ``folder``.

    Raises:
        MissingExtraError: tensorboardX is not installed.
        ConfigError: ``folder`` has scalars already, or cannot be made.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("writing TensorBoard scalars", "tensorboard") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob("events.out.tfevents.*")):  # a second file would show every point twice
            raise ConfigError(f"{folder} has scalars already: remove it, or choose another folder with --out")
        with TemporaryDirectory(prefix=".", dir=folder) as work:
            with SummaryWriter(work) as writer:
                for line in history:
                    when = datetime.fromisoformat(line.closed).timestamp() if line.closed else None
                    for name, value in sorted(line.metrics.items()):
                        writer.add_scalar(name, value, line.round, walltime=when)
            for path in Path(work).iterdir():
                path.replace(folder / path.name)
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error.strerror or error}") from error
    return folder
