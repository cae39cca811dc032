"""Flower's simulation engine (Ray), with real ClientApp workers: bit for bit the native run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedbpt.runs.store import RunStore
from tests.flower.toy_app import natively, short

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
def test_a_simulated_run_equals_the_native_run_even_when_resumed(tmp_path: Path) -> None:
    """Runs in a separate process, because Ray leaves threads and files behind."""
    environment = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0"}
    for last in ("2", "0"):
        command = [sys.executable, "-m", "tests.flower.simulate", str(tmp_path / "flower.db"), "4", last]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=420)
        assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    native = natively(tmp_path / "native.db", 4, short())
    assert said == {"digest": native.digest, "correct": native.tuned.correct, "resumed": 3}
    with RunStore(tmp_path / "flower.db") as flower, RunStore(tmp_path / "native.db") as other:
        digests = [[stored.state_digest for stored in store.rounds("r")] for store in (flower, other)]
    assert digests[0] == digests[1]
