"""Write a run's metrics as TensorBoard event files, with tensorboardX (``fedbpt[tensorboard]``)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from fedbpt.errors import ConfigError, MissingExtraError
from fedbpt.runs.store import RoundHistory


def write_scalars(history: Sequence[RoundHistory], folder: Path) -> Path:
    """Write every metric of every round as a scalar whose step is the round; returns ``folder``.

    Raises:
        MissingExtraError: tensorboardX is not installed.
        ConfigError: ``folder`` already has scalars, or cannot be written.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("writing TensorBoard scalars", "tensorboard") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob("events.out.tfevents.*")):  # TensorBoard would show every point twice
            raise ConfigError(
                f"{folder} already has scalars: remove it, or choose another folder with --out", field="out"
            )
        with TemporaryDirectory(prefix=".", dir=folder) as work:
            with SummaryWriter(work) as writer:
                for line in history:
                    when = datetime.fromisoformat(line.closed).timestamp() if line.closed else None
                    for name, value in sorted(line.metrics.items()):
                        writer.add_scalar(name, value, line.round, walltime=when)
            for path in Path(work).iterdir():
                path.replace(folder / path.name)
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error.strerror or error}", field="out") from error
    return folder
