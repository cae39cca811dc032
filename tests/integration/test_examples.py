"""Every file of ``examples/`` runs as it is, with the real model, and says what it found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

SAYS = {
    "own_aggregation": r"better-half: \d+ evaluations, accuracy 0\.\d+",
    "own_task": r"zero-shot EvaluationResult\(.*\ntuned EvaluationResult\(",
    "score": r"with two prompts \[prompts, texts, labels\]: \[\[\[-?\d",
    "three_devices": r"c: \d+ reports, bytes \d+ up, \d+ down\naccuracy 0\.\d+",
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.timeout(1800)  # of a busy machine; by itself none takes longer than a minute
@pytest.mark.parametrize("name", sorted(SAYS))
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(SAYS[name], done.stdout)
