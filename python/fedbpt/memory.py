"""What this process holds in memory, as the operating system counts it."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path


def memory_of_process() -> dict[str, int]:
    """``rss`` now and ``peak_rss`` since start, bytes. Where the system has no /proc, ``rss`` is the peak."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    statm = Path("/proc/self/statm")
    rss = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.is_file() else peak
    return {"rss": rss, "peak_rss": max(peak, rss)}


def physical_memory() -> int:
    """The machine's RAM, bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
