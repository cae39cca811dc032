"""`kept_state`: a device's state in a file on its own disk, so that a restart forgets nothing that was spent."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from fedbpt.device.state import DeviceState
from fedbpt.errors import ConfigError, StoreError, WireError
from fedbpt.machine.file_lock import sole_holder
from fedbpt.net.tokens import read_private, write_private

log = logging.getLogger(__name__)

Keep = Callable[[DeviceState], None]


@contextmanager
def kept_state(path: Path) -> Iterator[tuple[DeviceState, Keep]]:
    """The state in the file at ``path``, created if absent, and the function for `Device` that writes it.

    Within the block no other process can use the file, which only its owner can read: its key can remove noise.

    Raises `ConfigError` for a file that cannot be written, is damaged, in use, or readable by others.
    """
    lock = path.with_name(f"{path.name}.lock")
    with ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(sole_holder(lock, str(path)))
        except BlockingIOError as error:
            raise ConfigError(f"{path} is in use by {error.strerror}: give each device its own", field="--state") from (
                error
            )
        except OSError as error:
            raise ConfigError(f"cannot lock {lock}: {error.strerror or error}", field="--state") from error
        state = _read(path) if path.exists() else DeviceState()
        _write(path, state)
        yield state, lambda changed: _keep(path, changed)


def _read(path: Path) -> DeviceState:
    try:
        return DeviceState.from_bytes(read_private(path))
    except WireError as error:
        raise ConfigError(
            f"{path} is damaged, and with it what was spent: restore it, or move it away to count from zero",
            field="--state",
        ) from error


def _write(path: Path, state: DeviceState) -> None:
    write_private(path, replace(state, fitted=None, fitted_to=b"").to_bytes())


def _keep(path: Path, state: DeviceState) -> None:
    try:
        _write(path, state)
    except ConfigError as error:
        log.error("%s: the result is not sent", error)
        raise StoreError("the device cannot write what it spends (--state), so it sends nothing") from error
