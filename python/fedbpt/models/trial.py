"""Model files are tried in a process of their own before they are loaded here.

llama.cpp asserts, crashes or never returns on some files that contradict themselves, and takes the process with it. So
a child loads each model first, and does once and small what is ever done with one (``src/fedbpt_native/trial.h``). What
passed is remembered in ``trials/`` of the cache folder, until one of the model's files, fedbpt or the machine changes.
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

# Isolated and without site: the native module is all that it imports, and it is ready after some 30 ms.
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
_IN_TRIAL = "FEDBPT_IN_TRIAL"  # set in the child: whatever starts there, it starts no other

_BYTES_PER_THREAD = 64_000_000  # a smaller model is tried by one thread in no time
_CPU_S, _CPU_S_PER_BYTE = 30, 3e-7  # of all threads together: a hundred times what any board needs
_WALL_PER_CPU = 10
_MEMORY_BYTES, _MEMORY_PER_BYTE = 2 << 30, 2  # weights may be there twice while they are laid out for the CPU


@dataclass(frozen=True)
class TrialSettings:
    """How the model is to be loaded, as `fedbpt.load_model` has it."""

    n_threads: int = 1
    n_gpu_layers: int = 0
    gpu: str | None = None
    kv_type: str = "f16"


@dataclass(frozen=True)
class TrialReport:
    """A model that passed. ``tried`` False: this Python cannot start another one, so nothing was tried."""

    path: Path
    tried: bool
    seconds: float


class _Passed(msgspec.Struct, frozen=True):
    """What passed: the model's files as they were, and where: build of fedbpt, machine, settings."""

    paths: tuple[str, ...]
    files: tuple[FileStamp, ...]
    where: str


_passed: set[_Passed] = set()


def run(path: Path, settings: TrialSettings = TrialSettings()) -> TrialReport:
    """Try a model, whatever is known of it.

    Args:
        path: the GGUF file, of a split model its first part.
        settings: as the model is to be loaded.

    Raises:
        ModelFileError: the model is damaged, contradicts itself, or asks for more memory than there is.
        UnsupportedModelError: soft prompts do not work with it.
        InputError: GPU layers where there is no (such) GPU, a ``kv_type`` that does not divide the model's heads.
    """
    began = time.monotonic()
    reason = _no_interpreter()
    if reason is None:
        reason = _run_child(path, settings)
    if reason is not None and not os.environ.get(_IN_TRIAL):
        log.warning(
            "%s is loaded untried, by what its header says alone: %s. A damaged file may end this process",
            printable(path), reason,
        )  # fmt: skip
    return TrialReport(path, reason is None, time.monotonic() - began)


def run_once(path: Path, settings: TrialSettings) -> None:
    """Try a model unless it passed before. Where several processes ask at once, one of them tries it.

    Raises as `run`.
    """
    parts = model_parts(path)
    passed = _Passed(real_paths(parts), stamps_of(parts), f"{_build()} {os.uname().nodename} {_how(settings)}")
    record = _record_of(passed, settings)
    if passed in _passed or read_record(record, _Passed) == passed:
        return
    with _alone(path):
        if passed in _passed or read_record(record, _Passed) == passed:
            return
        if run(path, settings).tried:
            _remember(record, passed)


def _no_interpreter() -> str | None:
    """Why this Python cannot start another one like itself; None where it can."""
    if os.environ.get(_IN_TRIAL):
        return "this process is itself one that tries a model"
    if not sys.executable:
        return "Python is embedded here, and sys.executable is empty"
    if getattr(sys, "frozen", False) or "python" not in Path(sys.executable).name.lower():
        return f"sys.executable is no Python interpreter but {sys.executable}"
    return None


def _run_child(path: Path, settings: TrialSettings) -> str | None:
    """Try ``path`` in a child. None: it passed. Else why no child could be started."""
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
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_WALL_PER_CPU * cpu_s, env=environment,
            check=False,
        )  # fmt: skip
    except OSError as error:
        return f"{sys.executable} cannot be started ({error.strerror or error})"
    except subprocess.TimeoutExpired as expired:
        raise _end(path, _lines(expired.stdout), f"it did not end within {expired.timeout:.0f} s") from None
    said = _lines(child.stdout)
    if "ready" not in said:
        lines = _lines(child.stderr)
        return f"{sys.executable} did not start ({lines[-1] if lines else f'exit status {child.returncode}'})"
    if said[-1] == "passed":
        return None
    if said[-1].startswith("refused "):
        _, kind, why = said[-1].split(" ", 2)
        refusal: errors.FedbptError = getattr(errors, kind)(why)
        raise refusal
    raise _end(path, said, _reason(child.returncode, cpu_s))


def _lines(output: bytes | None) -> list[str]:
    return (output or b"").decode(errors="replace").splitlines()


def _reason(status: int, cpu_s: int) -> str:
    if status == -signal.SIGXCPU:
        return f"it did not end within {cpu_s} s of computing"
    if status == -signal.SIGKILL:
        return "SIGKILL: most often the system's, where memory is short"
    with contextlib.suppress(ValueError):
        return signal.Signals(-status).name
    return f"exit status {status}"


def _end(path: Path, said: list[str], reason: str) -> ModelFileError:
    """What to raise where the child did not come to its end."""
    stage = next((line.removeprefix("stage ") for line in reversed(said) if line.startswith("stage ")), "at its start")
    reason = next((line.removeprefix("abort ") for line in said if line.startswith("abort ")), reason)
    return ModelFileError(
        f"{printable(path)} ends llama.cpp {stage} ({reason}): it is damaged or contradicts itself; fetch it again, or "
        "take another file of the model or a newer fedbpt"
    )


def _native_file() -> Path:
    spec = find_spec("fedbpt._native")
    if spec is None or spec.origin is None:
        raise ImportError("fedbpt._native is not installed: build fedbpt (pip install .)")
    return Path(spec.origin)


def _build() -> str:
    """Which build of fedbpt this is: another one may know more, or less, of a file."""
    status = _native_file().stat()
    return f"{VERSION} {status.st_size} {status.st_mtime_ns}"


def _how(settings: TrialSettings) -> str:
    device = f"gpu {settings.gpu or 'any'}" if settings.n_gpu_layers else "cpu"
    return f"{device} {settings.kv_type}"


def _record_of(passed: _Passed, settings: TrialSettings) -> Path:
    name = hashlib.sha256("\n".join((*passed.paths, _how(settings))).encode()).hexdigest()[:32]
    return cache_folder() / "trials" / f"{name}.json"


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock on a model's file, which tells processes apart without any file of ours."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # without it, at worst, a file is tried more than once
            fcntl.flock(held.enter_context(path.open("rb")), fcntl.LOCK_EX)
        yield


def _remember(record: Path, passed: _Passed) -> None:
    _passed.add(passed)
    try:
        for other in record.parent.glob("*.json"):  # of models that are gone
            known = read_record(other, _Passed)
            if known is None or not Path(known.paths[0]).exists():
                other.unlink(missing_ok=True)
        write_record(record, passed)
    except OSError as error:  # a full disk, a read-only cache: slower, not wrong
        log.warning(
            "that %s passed its trial cannot be kept in %s (%s): it is tried anew at each start",
            Path(passed.paths[0]).name, cache_folder(), error.strerror or error,
        )  # fmt: skip
