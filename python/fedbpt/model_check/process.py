"""`check_model`: checks of a model file in a child process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, cast

import msgspec

from fedbpt import models
from fedbpt.argument_types import checked
from fedbpt.checking import printable
from fedbpt.decoders import from_json
from fedbpt.engine.native_scorer import KVType
from fedbpt.errors import ModelFileError
from fedbpt.machine.interrupts import interruptible
from fedbpt.model_check.child import Begun, Message, Settings
from fedbpt.model_check.findings import CHECKS, Finding, ModelCheck, ModelFacts
from fedbpt.plain_text import one_line
from fedbpt.quantities import GpuLayers, Threads

_MAX_OUTPUT_CHARS = 300  # of the last line that the process wrote before it ended


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
    """Check that a model loads and that its scores are consistent, in a child process, which a bad file may crash.

    Costs some 700 forward tokens. Texts are short: problems that only show in long ones, such as beyond a sliding
    window, are not found. The result's ``holds`` is True if all of `CHECKS` hold.

    Args:
        name_or_path, n_threads, n_gpu_layers, gpu, kv_type: as for `load_model`.
        timeout_s: time limit in seconds.
        on_check: called with the name of each of `CHECKS` as it begins.

    Raises:
        InputError: an invalid setting.
        ModelNotFoundError: no such name, not pulled yet, or no such file.
    """
    settings = Settings(n_threads, n_gpu_layers, gpu, kv_type, timeout_s)
    try:
        path = models.locate(name_or_path)
    except ModelFileError as error:  # such as a missing part
        return _outcome(printable(name_or_path), None, [Finding("loads", False, str(error))])
    command = [sys.executable, "-m", "fedbpt.model_check.child", str(path), msgspec.json.encode(settings).decode()]
    facts: ModelFacts | None = None
    findings: list[Finding] = []
    check = "loads"
    start = time.monotonic()
    last_output = ""
    with _started(command) as process:
        for line in process.stdout or ():
            message = _decoded(line)
            if isinstance(message, Begun):
                check = message.name
                start = time.monotonic()
                if on_check is not None:
                    on_check(check)
            elif isinstance(message, ModelFacts):
                facts = message
            elif isinstance(message, Finding):
                findings.append(message)
            elif line.strip():
                last_output = line.decode(errors="backslashreplace")
        code = process.wait()
    if code != 0 and check not in {finding.name for finding in findings}:
        detail = _why_ended(code, last_output, timeout_s)
        findings.append(Finding(check, False, detail, time.monotonic() - start))
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


def _decoded(line: bytes) -> Message | None:
    try:
        message: Message = from_json(line, cast(Any, Message))
        return message
    except msgspec.DecodeError:  # output of llama.cpp before it crashes
        return None


def _why_ended(code: int, last_output: str, timeout_s: int) -> str:
    if code == -signal.SIGALRM:
        return f"no result within {timeout_s} s"
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return one_line(f"the process ended with {how}{': ' if last_output else ''}{last_output}", _MAX_OUTPUT_CHARS)


def _outcome(path: str, facts: ModelFacts | None, found: list[Finding]) -> ModelCheck:
    by_name = {finding.name: finding for finding in found}
    return ModelCheck(path, facts, tuple(by_name.get(name, Finding(name, None)) for name in CHECKS))
