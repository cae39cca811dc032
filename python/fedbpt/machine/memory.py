"""What this process holds in memory, as the operating system counts it."""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path

from fedbpt.errors import ConfigError
from fedbpt.machine.system_files import PROC, text

WEIGHTS_ALLOWANCE = 1.15  # benchmarks/bench_memory.py holds us to it: weights, and what is computed with them
INTERPRETER_BYTES = 64 * 2**20


def memory_of_process(proc: Path = PROC) -> dict[str, int]:
    """``rss`` now and ``peak_rss`` since start, bytes. Where the system does not tell ``rss``, it is the peak."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found = re.match(r"[0-9]+ ([0-9]{1,18}) ", text(proc / "self/statm") or "")
    rss = int(found[1]) * os.sysconf("SC_PAGE_SIZE") if found else peak
    return {"rss": rss, "peak_rss": max(peak, rss)}


def kv_budget_within(limit: int, weights: int, wanted: int) -> int:
    """The KV that a process of at most ``limit`` bytes may keep beside a model file of ``weights`` bytes.

    At most ``wanted``. Raises `ConfigError` where the model alone does not fit; it names the least that would do.
    """
    room = limit - INTERPRETER_BYTES - int(WEIGHTS_ALLOWANCE * weights)
    if room < 0:
        least = -(-(limit - room) // 2**20)
        raise ConfigError(
            f"the model does not fit in {limit // 2**20} MiB: give --max-memory {least} or more, or a smaller model"
        )
    return min(room, wanted)


def physical_memory() -> int:
    """The machine's RAM, bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
