"""`kept_state`: a device's state in a file on its own disk, so that a restart forgets nothing that was spent."""

from __future__ import annotations

import logging
import threading
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

    Within the block no other process can use the file, which only its owner can read: its key can remove noise. After
    it, nothing is written, though a thread may still work.

    Raises `ConfigError` for a file that is damaged or readable by others, `StoreError` for one that cannot be written
    or is in use, which may pass.
    """
    path = path.resolve()
    lock = path.with_name(f"{path.name}.lock")
    with ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(sole_holder(lock, str(path)))
        except BlockingIOError as error:
            raise StoreError(f"{path} is in use by {error.strerror}: give each device its own", field="--state") from (
                error
            )
        except OSError as error:
            raise StoreError(f"cannot lock {lock}: {error.strerror or error}", field="--state") from error
        state = _read(path) if path.exists() else DeviceState()
        writer = _Writer(path)
        try:
            writer.write(state)
            yield state, writer.keep
        finally:
            writer.close()


def _read(path: Path) -> DeviceState:
    try:
        return DeviceState.from_bytes(read_private(path))
    except WireError as error:
        raise ConfigError(
            f"{path} is damaged, and with it what was spent: restore it, or move it away to count from zero",
            field="--state",
        ) from error


class _Writer:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._writing = threading.Lock()
        self._closed = False

    def write(self, state: DeviceState) -> None:
        """Raises `StoreError`."""
        with self._writing:
            if self._closed:
                raise StoreError("the device has ended: start it again", field="--state")
            try:
                write_private(self._path, replace(state, fitted=None, fitted_to=b"").to_bytes())
            except ConfigError as error:
                raise StoreError(str(error), field="--state") from error

    def keep(self, state: DeviceState) -> None:
        """Write before a result is sent."""
        try:
            self.write(state)
        except StoreError as error:
            log.error("%s: the result is not sent", error)
            raise StoreError(
                "the device cannot write what it spends, so it sends nothing: make room for its --state",
                field="--state",
            ) from error

    def close(self) -> None:
        with self._writing:
            self._closed = True
