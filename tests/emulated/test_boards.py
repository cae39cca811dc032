"""The wheel for 64-bit ARM on emulated boards and this machine; ``make test-aarch64`` sets the boards up."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.integration.processes import ready
from tests.integration.test_cli_processes import Workshop

BOARDS = os.environ.get("FEDBPT_BOARDS", "")
pytestmark = [
    pytest.mark.skipif(not BOARDS, reason="needs emulated boards: make test-aarch64"),
    pytest.mark.timeout(1800),
]

LOADS_BACKENDS = "from fedbpt import _native; _native.matmul_flops('f32')"


def board(cpu: str) -> Path:
    """The Python of an emulated board."""
    return Path(BOARDS).resolve() / cpu / "python"


@pytest.mark.parametrize(("cpu", "code"), [("cortex-a76", "armv8.2_2"), ("cortex-a57", "armv8.0_1")])
def test_a_board_runs_the_code_for_its_cpu(cpu: str, code: str) -> None:
    command = [board(cpu), "-c", LOADS_BACKENDS]
    environment = {**os.environ, "FEDBPT_LLAMA_LOG": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert f"fedbpt/libggml-cpu-{code}.so" in done.stderr


def test_a_pi_a_tx2_and_this_machine_tune_one_prompt(tmp_path: Path, fleet) -> None:
    workshop = Workshop(tmp_path, fleet)
    boards = {"a": board("cortex-a76"), "b": board("cortex-a57")}
    given = ("device", "--model", "tiny.gguf", "--task", "mood.toml", "--port", "0", "--threads", "1", "--json")
    devices = [
        fleet.spawn("fedbpt", *given, "--data", f"{name}.jsonl", "--name", name, cwd=tmp_path, python=python)
        for name, python in boards.items()
    ]
    devices.append(workshop.device("test"))
    workshop.run_file([ready(device) for device in devices], "rounds = 2")
    run_file = tmp_path / "run.toml"
    run_file.write_text(run_file.read_text().replace("deadline_s = 20.0", "deadline_s = 600.0"))

    tune = workshop.spawn("tune", "run.toml", "--json")
    out, err = tune.communicate(timeout=1200)
    assert (tune.returncode, err) == (0, "")
    result = json.loads(out)
    assert (result["rounds"], result["evaluations"]) == (2, 12)
    assert [device["reports"] for device in result["devices"]] == [3, 3, 3]
