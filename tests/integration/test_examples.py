"""Every file of ``examples/`` runs unchanged with the real model, and prints its result."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"

PRINTS = {
    "own_aggregation": r"better-half: \d+ evaluations, accuracy [01]\.\d+",
    "own_task": r"zero-shot EvaluationResult\(.*\ntuned EvaluationResult\(",
    "score": r"with two prompts \[prompts, texts, labels\]: \[\[\[-?\d",
    "three_devices": r"c: \d+ reports, bytes \d+ up, \d+ down\naccuracy [01]\.\d+",
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PRINTS)


@pytest.mark.timeout(1800)  # on a busy machine; on an idle one none takes longer than a minute
@pytest.mark.parametrize("name", sorted(PRINTS))
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(PRINTS[name], done.stdout)
