"""The memory of this process and of the machine."""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path

from fedbpt.errors import ConfigError
from fedbpt.machine.system_files import PROC, text

WEIGHTS_ALLOWANCE = 1.15  # weights with compute buffers; benchmarks/bench_memory.py checks it
INTERPRETER_BYTES = 64 * 2**20


def memory_of_process(proc: Path = PROC) -> dict[str, int]:
    """Current ``rss`` and ``peak_rss`` since start, in bytes. ``rss`` is the peak if the system does not report it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found = re.match(r"[0-9]+ ([0-9]{1,18}) ", text(proc / "self/statm") or "")
    rss = int(found[1]) * os.sysconf("SC_PAGE_SIZE") if found else peak
    return {"rss": rss, "peak_rss": max(peak, rss)}


def kv_budget_within(limit: int, weights: int, wanted: int) -> int:
    """The size of the KV cache, at most ``wanted``, in a process of ``limit`` bytes with a model of ``weights`` bytes.

    Raises `ConfigError`, with the smallest possible limit in MiB, if the model itself does not fit.
    """
    available = limit - INTERPRETER_BYTES - int(WEIGHTS_ALLOWANCE * weights)
    if available < 0:
        least = -(-(limit - available) // 2**20)
        raise ConfigError(
            f"the model does not fit in {limit // 2**20} MiB: give --max-memory {least} or more, or a smaller model",
            field="--max-memory",
            limit=least,
        )
    return min(available, wanted)


def physical_memory() -> int:
    """The machine's RAM in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
