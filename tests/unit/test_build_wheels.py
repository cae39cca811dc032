"""`tools/build_wheels.py`: which Pythons it builds with. Each build checks what it built with `check_wheel.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import build_wheels
import pytest


def write_python(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def pyenv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pyenv's folder, with nothing in it, and nothing else on PATH."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    return tmp_path / "pyenv"


def test_a_python_on_path_comes_first(tmp_path: Path, pyenv: Path) -> None:
    found = write_python(tmp_path / "bin" / "python3.11", "echo 3.11")
    write_python(pyenv / "versions" / "3.11.7" / "bin" / "python", "echo 3.11")
    assert build_wheels.find_python("3.11") == found


@pytest.mark.parametrize("body", ["exit 127", "echo 3.12", "echo 3.11; exit 1"])
def test_one_that_does_not_run_is_another_or_has_no_headers_is_passed_over(
    tmp_path: Path, pyenv: Path, body: str
) -> None:
    write_python(tmp_path / "bin" / "python3.11", body)
    found = write_python(pyenv / "versions" / "3.11.7" / "bin" / "python", "echo 3.11")
    assert build_wheels.find_python("3.11") == found


def test_a_missing_python_is_said_before_anything_is_built() -> None:
    command = [sys.executable, build_wheels.__file__, "x86_64", "--pythons", "9.9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("fedbpt: found no Python 9.9 with C headers: install it, or choose others")
