"""Lock a run for one process, with a file next to the run's store."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedbpt.errors import StoreError
from fedbpt.machine.file_lock import sole_holder


@contextmanager
def sole_worker(store: Path, run: str) -> Iterator[None]:
    """Lock ``run`` of the database at ``store`` within the block. Raises `StoreError` if it is locked already."""
    name = hashlib.sha256(run.encode()).hexdigest()[:16]
    path = store.resolve()
    path = path.with_name(f"{path.name}-{name}.lock")
    with ExitStack() as held:
        try:
            held.enter_context(sole_holder(path, f"run {run!r}"))
        except BlockingIOError as error:
            raise StoreError(
                f"run {run!r} in {store} is running in {error.strerror}: wait until it ends, or choose another run "
                "name or store",
                field="run",
            ) from error
        except OSError as error:
            raise StoreError(f"cannot lock run {run!r} with {path}: {error.strerror or error}", field="run") from error
        yield
