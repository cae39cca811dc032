"""Dependencies: an install on a device must stay small, and need no compiler."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIME = {
    "cma",
    "httpx",
    "msgspec",
    "numpy",
    "rich",
    "safetensors",
    "starlette",
    "threadpoolctl",
    "tomli",
    "typer",
    "uvicorn",
}
HEAVY = {
    "datasets",
    "huggingface-hub",
    "matplotlib",
    "nicegui",
    "pandas",
    "prometheus-client",
    "pyarrow",
    "tensorboardX",
    "torch",
    "transformers",
    "cmake",
    "ninja",
}


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", requirement, maxsplit=1)[0] for requirement in requirements}


def test_an_install_brings_only_what_is_known_to_have_wheels_and_be_small() -> None:
    assert names(PROJECT["dependencies"]) == RUNTIME
    assert not RUNTIME & HEAVY


@pytest.mark.parametrize(
    "command", ["import fedbpt", "import fedbpt.cli", "import fedbpt.cli.device, fedbpt.device.agent.server"]
)
def test_nothing_heavy_is_imported_by_a_device(command: str) -> None:
    probe = f"import sys; {command}; print(sorted(set({sorted(HEAVY | {'cma'})!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
