"""Trial loads of model files in a child process, before they are loaded into this one.

llama.cpp asserts, crashes or hangs on some inconsistent files, which would end this process. So a child loads each
model first and does a small instance of everything that is done with a model (``src/fedbpt_native/trial.h``). A success
is recorded in ``trials/`` of the cache folder, until one of the model's files, fedbpt or the machine changes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import msgspec

from fedbpt import errors
from fedbpt.checking import printable
from fedbpt.errors import ModelFileError
from fedbpt.machine.folders import cache_folder
from fedbpt.models.fingerprints import FileStamp, real_paths, stamps_of
from fedbpt.models.parts import model_parts
from fedbpt.models.records import read_record, write_record
from fedbpt.version import VERSION

log = logging.getLogger(__name__)

# Isolated and without site: it imports only the native module, and is ready after some 30 ms.
_CHILD = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
print("ready", flush=True)
path, n_threads, n_gpu_layers, gpu, kv_type, memory_bytes, cpu_seconds = sys.argv[2:]
native.try_alone(
    os.fsencode(path), int(n_threads), int(n_gpu_layers), gpu, kv_type == "q8_0", int(memory_bytes), int(cpu_seconds)
)
"""
_IN_TRIAL = "FEDBPT_IN_TRIAL"  # set in the child, which must not start another child

_BYTES_PER_THREAD = 64_000_000  # for a smaller model, one thread is fast enough

# Limit of the CPU time of all threads together: 100 times what any board needs.
_CPU_S = 30
_CPU_S_PER_BYTE = 3e-7
_WALL_PER_CPU = 10

# Memory limit: weights may exist twice while they are repacked for the CPU.
_MEMORY_BYTES = 2 << 30
_MEMORY_PER_BYTE = 2


@dataclass(frozen=True)
class TrialSettings:
    """The settings that the model will be loaded with, as for `fedbpt.load_model`."""

    n_threads: int = 1
    n_gpu_layers: int = 0
    gpu: str | None = None
    kv_type: str = "f16"


@dataclass(frozen=True)
class TrialReport:
    """A model that passed. ``tried`` False: this Python cannot start a child, so nothing was tried."""

    path: Path
    tried: bool
    seconds: float


class _Passed(msgspec.Struct, frozen=True):
    """A successful trial: the model's files, and in ``where`` the build of fedbpt, machine and settings."""

    paths: tuple[str, ...]
    files: tuple[FileStamp, ...]
    where: str


_passed: set[_Passed] = set()


def run(path: Path, settings: TrialSettings = TrialSettings()) -> TrialReport:
    """Try a model, even if it passed before.

    Args:
        path: the GGUF file, or the first part of a split model.
        settings: the settings that it will be loaded with.

    Raises:
        ModelFileError: the model is damaged, inconsistent, or needs more memory than there is.
        UnsupportedModelError: soft prompts do not work with it.
        InputError: GPU layers without a (matching) GPU, or a ``kv_type`` that does not divide the model's heads.
    """
    began = time.monotonic()
    reason = _no_interpreter()
    if reason is None:
        reason = _run_child(path, settings)
    if reason is not None and not os.environ.get(_IN_TRIAL):
        log.warning(
            "%s is loaded without a trial, after a check of its header only: %s. A damaged file may crash this process",
            printable(path),
            reason,
        )
    return TrialReport(path, reason is None, time.monotonic() - began)


def run_once(path: Path, settings: TrialSettings) -> None:
    """Try a model unless it passed before. Of several concurrent processes, one tries it. Raises as `run`."""
    parts = model_parts(path)
    passed = _Passed(real_paths(parts), stamps_of(parts), f"{_build()} {os.uname().nodename} {_how(settings)}")
    record = _record_of(passed, settings)
    if passed in _passed or read_record(record, _Passed) == passed:
        return
    with _lock(path):
        if passed in _passed or read_record(record, _Passed) == passed:
            return
        if run(path, settings).tried:
            _remember(record, passed)


def _no_interpreter() -> str | None:
    """Why this Python cannot start a child interpreter; None if it can."""
    if os.environ.get(_IN_TRIAL):
        return "this process is itself a trial"
    if not sys.executable:
        return "Python is embedded, and sys.executable is empty"
    if getattr(sys, "frozen", False) or "python" not in Path(sys.executable).name.lower():
        return f"sys.executable is not a Python interpreter, but {sys.executable}"
    return None


def _run_child(path: Path, settings: TrialSettings) -> str | None:
    """Try ``path`` in a child. Returns None if it passed, or the reason why no child could be started."""
    size = sum(part.stat().st_size for part in model_parts(path))
    n_threads = max(1, min(settings.n_threads, 1 + size // _BYTES_PER_THREAD))
    memory = 0 if settings.n_gpu_layers else int(_MEMORY_BYTES + _MEMORY_PER_BYTE * size)
    cpu_s = int(_CPU_S + _CPU_S_PER_BYTE * size)
    given = (n_threads, settings.n_gpu_layers, settings.gpu or "", settings.kv_type, memory, cpu_s)
    python = [sys.executable, "-I", "-S", "-c", _CHILD]
    command = [*python, os.fspath(_native_file()), os.fspath(path), *map(str, given)]
    environment = {**os.environ, _IN_TRIAL: "1", "GGML_NO_BACKTRACE": "1"}
    try:
        child = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_WALL_PER_CPU * cpu_s,
            env=environment,
            check=False,
        )
    except OSError as error:
        return f"{sys.executable} cannot be started ({error.strerror or error})"
    except subprocess.TimeoutExpired as expired:
        raise _crash(path, _lines(expired.stdout), f"no end within {expired.timeout:.0f} s") from None
    output = _lines(child.stdout)
    if "ready" not in output:
        lines = _lines(child.stderr)
        return f"{sys.executable} did not start ({lines[-1] if lines else f'exit status {child.returncode}'})"
    if output[-1] == "passed":
        return None
    if output[-1].startswith("refused "):
        _, error_name, message = output[-1].split(" ", 2)
        refusal: errors.FedbptError = getattr(errors, error_name)(message)
        raise refusal
    raise _crash(path, output, _reason(child.returncode, cpu_s))


def _lines(output: bytes | None) -> list[str]:
    return (output or b"").decode(errors="replace").splitlines()


def _reason(status: int, cpu_s: int) -> str:
    if status == -signal.SIGXCPU:
        return f"no end within {cpu_s} s of CPU time"
    if status == -signal.SIGKILL:
        return "SIGKILL, most often because the system is out of memory"
    with contextlib.suppress(ValueError):
        return signal.Signals(-status).name
    return f"exit status {status}"


def _crash(path: Path, output: list[str], reason: str) -> ModelFileError:
    """Build the error for a child that crashed or hung, from its output."""
    stages = [line.removeprefix("stage ") for line in output if line.startswith("stage ")]
    stage = stages[-1] if stages else "at its start"
    reason = next((line.removeprefix("abort ") for line in output if line.startswith("abort ")), reason)
    return ModelFileError(
        f"{printable(path)} is damaged or inconsistent, llama.cpp failed {stage} ({reason}): download it again, or use "
        "another file of the model or a newer fedbpt"
    )


def _native_file() -> Path:
    spec = find_spec("fedbpt._native")
    if spec is None or spec.origin is None:
        raise ImportError("fedbpt._native is not installed: build fedbpt (pip install .)")
    return Path(spec.origin)


def _build() -> str:
    """Identify this build of fedbpt: another one may accept other files."""
    status = _native_file().stat()
    return f"{VERSION} {status.st_size} {status.st_mtime_ns}"


def _how(settings: TrialSettings) -> str:
    device = f"gpu {settings.gpu or 'any'}" if settings.n_gpu_layers else "cpu"
    return f"{device} {settings.kv_type}"


def _record_of(passed: _Passed, settings: TrialSettings) -> Path:
    name = hashlib.sha256("\n".join((*passed.paths, _how(settings))).encode()).hexdigest()[:32]
    return cache_folder() / "trials" / f"{name}.json"


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock on the model's own file, so that no lock file is needed."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # without the lock, a file may be tried more than once
            fcntl.flock(held.enter_context(path.open("rb")), fcntl.LOCK_EX)
        yield


def _remember(record: Path, passed: _Passed) -> None:
    _passed.add(passed)
    try:
        for other in record.parent.glob("*.json"):  # clean up after models that were deleted
            known = read_record(other, _Passed)
            if known is None or not Path(known.paths[0]).exists():
                other.unlink(missing_ok=True)
        write_record(record, passed)
    except OSError as error:  # a full disk or a read-only cache: slower, not wrong
        log.warning(
            "cannot record the trial of %s in %s (%s): it is tried again at each start",
            Path(passed.paths[0]).name,
            cache_folder(),
            error.strerror or error,
        )
