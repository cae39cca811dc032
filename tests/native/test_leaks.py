"""Memory does not grow with the number of calls, however they end. `leak_probe` is a separate process: pytest grows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import tiny_gguf

PROBE = Path(__file__).with_name("leak_probe.py")
N_CALLS = 20_000
BYTES_PER_CALL = 4.0
"""A leak of 64 bytes in one of the six kinds of calls gives more than 10; fluctuating pages give less than 1."""


def test_memory_does_not_grow_with_the_number_of_calls(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "tiny.gguf", tiny_gguf.SMALLEST)
    done = subprocess.run([sys.executable, PROBE, path, str(N_CALLS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    calls, rss = np.array(measured["calls"]), np.array(measured["rss"])
    late = calls > N_CALLS // 2
    slope = np.polyfit(calls[late], rss[late], 1)[0]
    assert slope < BYTES_PER_CALL, f"the process grows by {slope:.1f} bytes a call"
