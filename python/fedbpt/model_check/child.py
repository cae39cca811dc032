"""The process in which a model file is tried: ``python -m fedbpt.model_check.child PATH SETTINGS``.

A file from elsewhere may end the process that loads it. What is found so far goes to standard output, a JSON value a
line; the last `Begun` says what was tried when the process ended.
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

from fedbpt.engine.native_scorer import KVType, load_model
from fedbpt.errors import FedbptError, ModelWarning
from fedbpt.model_check.findings import CHECKS, Finding, ModelFacts
from fedbpt.model_check.probes import Answer, Probes


class Begun(msgspec.Struct, frozen=True, tag=True):
    """The check of this name begins."""

    name: str


class Settings(msgspec.Struct, frozen=True):
    """As for `load_model`; ``timeout_s``: whole seconds after which the process ends itself."""

    n_threads: int | None
    n_gpu_layers: int
    gpu: str | None
    kv_type: KVType
    timeout_s: int


Said = Begun | Finding | ModelFacts
Tell = Callable[[Said], None]


def examine(path: Path, settings: Settings, tell: Tell) -> None:
    """Try all of `CHECKS` on a model file; those after a load that failed are left out."""
    probes: Probes | None = None

    def load() -> Answer:
        nonlocal probes
        scorer = load_model(
            path,
            settings.n_threads,
            settings.n_gpu_layers,
            gpu=settings.gpu,
            kv_type=settings.kv_type,
        )
        probes = Probes(scorer)
        tell(probes.facts)
        return True, f"{scorer.backend}, {scorer.n_threads} threads"

    _try("loads", load, tell)
    if probes is not None:
        for name in list(CHECKS)[1:]:
            _try(name, getattr(probes, name), tell)


def _try(name: str, check: Callable[[], Answer], tell: Tell) -> None:
    tell(Begun(name))
    begin = time.monotonic()
    try:
        holds, detail = check()
    except FedbptError as error:
        holds, detail = False, str(error)
    tell(Finding(name, holds, detail, time.monotonic() - begin))


def main() -> None:
    """See the module."""
    settings = msgspec.json.decode(sys.argv[2], type=Settings)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(settings.timeout_s)  # also where the parent is gone
    warnings.simplefilter("ignore", ModelWarning)  # they are among the facts
    said = os.fdopen(os.dup(1), "wb", buffering=0)

    def tell(what: Said) -> None:
        said.write(msgspec.json.encode(what) + b"\n")

    examine(Path(sys.argv[1]), settings, tell)


if __name__ == "__main__":
    main()
