"""`check_model`: what holds for a model file, found in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import msgspec

from fedbpt import models
from fedbpt.argument_types import checked
from fedbpt.checking import printable
from fedbpt.engine.native_scorer import KVType
from fedbpt.errors import ModelFileError
from fedbpt.machine.interrupts import interruptible
from fedbpt.model_check.child import Begun, Said, Settings
from fedbpt.model_check.findings import CHECKS, Finding, ModelCheck, ModelFacts
from fedbpt.plain_text import one_line
from fedbpt.quantities import GpuLayers, Threads

_MOST_SAID = 300  # characters of what the process said before it ended


@checked
@interruptible()
def check_model(
    name_or_path: str | os.PathLike[str],
    *,
    n_threads: Threads | None = None,
    n_gpu_layers: GpuLayers = 0,
    gpu: str | None = None,
    kv_type: KVType = "f16",
    timeout_s: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] = 600,
    on_check: Callable[[str], None] | None = None,
) -> ModelCheck:
    """Try what a model is used for, in another process, so that a file that ends it does no harm.

    It takes some 700 forward tokens. Texts are short: what only shows in long ones, beyond a sliding window say, is not
    seen. ``holds`` of the result is whether all of `CHECKS` do.

    Args:
        name_or_path, n_threads, n_gpu_layers, gpu, kv_type: as for `load_model`.
        timeout_s: whole seconds that it may take.
        on_check: called with the name of each of `CHECKS` as it begins.

    Raises:
        InputError: a setting that makes no sense.
        ModelNotFoundError: no such name, not pulled yet, or no such file.
    """
    settings = Settings(n_threads, n_gpu_layers, gpu, kv_type, timeout_s)
    try:
        path = models.locate(name_or_path)
    except ModelFileError as error:  # a part is missing, say
        return _outcome(printable(name_or_path), None, [Finding("loads", False, str(error))])
    command = [sys.executable, "-m", "fedbpt.model_check.child", str(path), msgspec.json.encode(settings).decode()]
    begun, facts, findings = "loads", None, list[Finding]()
    begin, said = time.monotonic(), ""
    with _started(command) as process:
        for line in process.stdout or ():
            told = _decoded(line)
            if isinstance(told, Begun):
                begun, begin = told.name, time.monotonic()
                if on_check is not None:
                    on_check(begun)
            elif isinstance(told, ModelFacts):
                facts = told
            elif isinstance(told, Finding):
                findings.append(told)
            elif line.strip():
                said = line.decode(errors="backslashreplace")
        code = process.wait()
    if code != 0 and begun not in {finding.name for finding in findings}:
        detail = _why_ended(code, said, timeout_s)
        findings.append(Finding(begun, False, detail, time.monotonic() - begin))
    return _outcome(printable(path), facts, findings)


@contextmanager
def _started(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def _decoded(line: bytes) -> Said | None:
    try:
        said: Said = msgspec.json.decode(line, type=Said)
        return said
    except msgspec.DecodeError:  # what llama.cpp says before it ends the process
        return None


def _why_ended(code: int, said: str, timeout_s: int) -> str:
    if code == -signal.SIGALRM:
        return f"it did not end within {timeout_s} s"
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return one_line(f"it ends the process ({how}){': ' if said else ''}{said}", _MOST_SAID)


def _outcome(path: str, facts: ModelFacts | None, found: list[Finding]) -> ModelCheck:
    of = {finding.name: finding for finding in found}
    return ModelCheck(path, facts, tuple(of.get(name, Finding(name, None)) for name in CHECKS))
