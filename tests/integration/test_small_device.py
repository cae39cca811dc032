"""An idle device is small: imports and memory of its process, with a tiny GGUF model."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedbpt import load_model
from tests.integration.processes import Fleet, ready
from tests.integration.test_cli_processes import Workshop, wait_until

NOT_ON_A_DEVICE = (
    "matplotlib",
    "datasets",
    "pyarrow",
    "pandas",
    "huggingface_hub",
    "torch",
    "cma",
    "httpx",
    "sqlite3",
    "fedbpt._native",
)
IDLE_BYTES = 40 * 2**20
"""Limit of private memory. With pages of shared libraries, depending on the system's cache, it has 55 to 61 MiB."""
STATUS = """
import json, sys, urllib.request
ask = urllib.request.Request(sys.argv[1] + "/v1/status", headers={"accept": "application/json"})
print(urllib.request.urlopen(ask, timeout=20).read().decode())
"""


@pytest.fixture
def workshop(tmp_path: Path, fleet: Fleet) -> Workshop:
    return Workshop(tmp_path, fleet)


def status(url: str) -> dict[str, object]:
    answer = subprocess.run([sys.executable, "-c", STATUS, url], check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(answer.stdout))


def test_an_idle_device_imports_only_what_it_needs(tmp_path: Path, fleet: Fleet) -> None:
    workshop = Workshop(tmp_path, fleet)
    probe = f"""
import json, os, sys
from fedbpt import cli
from fedbpt.cli import device
def ready(url):
    print(json.dumps([name for name in {NOT_ON_A_DEVICE!r} if name in sys.modules]), flush=True)
    os._exit(0)
device.announce = ready
cli.main(sys.argv[1:])
"""
    (workshop.folder / "probe.py").write_text(probe)
    process = fleet.spawn("probe", *workshop.device_arguments("a"), "--load-late", cwd=workshop.folder)
    out, err = process.communicate(timeout=60)
    assert out.strip() == "[]", err


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
def test_an_idle_device_uses_little_memory_until_its_model_is_loaded(workshop: Workshop) -> None:
    process = workshop.device("a", "--load-late")
    info = status(ready(process))
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    assert int(lines["RssAnon"].split()[0]) * 1024 <= IDLE_BYTES
    assert (info["model_name"], info["tokens_per_second"], info["n_train"]) == ("tiny", None, 20)


def test_a_model_is_loaded_late_by_the_first_work(workshop: Workshop) -> None:
    url = ready(workshop.device("a", "--load-late"))
    workshop.run_file([url], "rounds = 2")
    code, _, err = workshop.run("tune", "run.toml")
    assert code == 0, err
    assert status(url)["tokens_per_second"]


def test_a_scorer_that_loads_late_gives_the_same_logits(workshop: Workshop) -> None:
    path = workshop.folder / "tiny.gguf"
    eager, late = load_model(path, n_threads=1), load_model(path, n_threads=1, late=True)
    assert (late.name, late.fingerprint, late.backend) == (eager.name, eager.fingerprint, eager.backend)
    late.interrupt()
    assert late.memory()["weights"] == 0
    tokens, none = eager.tokenize("a good film"), np.zeros((1, 0, eager.n_embd), dtype=np.float32)
    np.testing.assert_array_equal(
        late.score_with_soft_prompt([tokens], none), eager.score_with_soft_prompt([tokens], none)
    )
    assert late.memory()["weights"] == eager.memory()["weights"] > 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_device_whose_log_is_on_a_full_disk_continues(workshop: Workshop) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = [*workshop.device_arguments("a"), "--port", str(port), "--load-late"]
    with Path("/dev/full").open("w") as full:
        process = workshop.fleet.spawn("fedbpt", *given, cwd=workshop.folder, stdout=full, stderr=full)
    url = f"http://127.0.0.1:{port}"
    workshop.run_file([url], "rounds = 1")
    wait_until(lambda: answers(port))
    code, _, err = workshop.run("tune", "run.toml")
    assert (code, process.poll()) == (0, None), err


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
