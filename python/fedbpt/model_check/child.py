"""The process that checks a model file: ``python -m fedbpt.model_check.child PATH SETTINGS``.

An untrusted file may crash the process that loads it. Messages go to standard output as they arise, one JSON value per
line; the last `Begun` is the check during which the process ended.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import msgspec

from fedbpt.decoders import from_json
from fedbpt.engine.native_scorer import KVType, load_model
from fedbpt.errors import FedbptError, ModelWarning
from fedbpt.model_check.findings import CHECKS, Finding, ModelFacts
from fedbpt.model_check.probes import Outcome, Probes


class Begun(msgspec.Struct, frozen=True, tag=True):
    """The check ``name`` begins."""

    name: str


class Settings(msgspec.Struct, frozen=True):
    """Settings as for `load_model`. ``timeout_s``: seconds after which the process ends itself."""

    n_threads: int | None
    n_gpu_layers: int
    gpu: str | None
    kv_type: KVType
    timeout_s: int


Message = Begun | Finding | ModelFacts
Send = Callable[[Message], None]


def examine(path: Path, settings: Settings, send: Send) -> None:
    """Run all `CHECKS` on a model file, or only the first if it does not load."""
    probes: Probes | None = None

    def load() -> Outcome:
        nonlocal probes
        scorer = load_model(
            path,
            settings.n_threads,
            settings.n_gpu_layers,
            gpu=settings.gpu,
            kv_type=settings.kv_type,
        )
        probes = Probes(scorer)
        send(probes.facts)
        return True, f"{scorer.backend}, {scorer.n_threads} threads"

    _run_check("loads", load, send)
    if probes is not None:
        for name in list(CHECKS)[1:]:
            _run_check(name, getattr(probes, name), send)


def _run_check(name: str, check: Callable[[], Outcome], send: Send) -> None:
    send(Begun(name))
    start = time.monotonic()
    try:
        holds, detail = check()
    except FedbptError as error:
        holds = False
        detail = str(error)
    send(Finding(name, holds, detail, time.monotonic() - start))


def main() -> None:
    settings = from_json(sys.argv[2], Settings)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(settings.timeout_s)  # works even if the parent has died
    warnings.simplefilter("ignore", ModelWarning)  # the warnings are in the facts
    output = os.fdopen(os.dup(1), "wb", buffering=0)

    def send(message: Message) -> None:
        output.write(msgspec.json.encode(message) + b"\n")

    examine(Path(sys.argv[1]), settings, send)


if __name__ == "__main__":
    main()
