"""`tools/emulated_boards.py` where boards are not available; `make test-aarch64` runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import emulated_boards
import pytest


def run(*arguments: object, path: str | None = None) -> tuple[int, list[str]]:
    command = [sys.executable, emulated_boards.__file__, *map(str, arguments)]
    environment = None if path is None else {"PATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr.splitlines()


def test_a_machine_without_debians_tools(tmp_path: Path) -> None:
    code, [line] = run("--cache", tmp_path, path=str(tmp_path))
    assert code == 1
    assert "apt-get" in line


def test_a_step_that_fails_leaves_no_half_made_boards(tmp_path: Path) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        (tmp_path / tool).write_text("#!/bin/sh\necho 'the mirror is away' >&2\nexit 100\n")
        (tmp_path / tool).chmod(0o755)
    cache = tmp_path / "cache"
    assert run("--cache", cache, path=str(tmp_path)) == (1, ["fedbpt: apt-get --quiet failed: the mirror is away"])
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("wheels", [["a-cp310-cp310-x.whl"], ["a-cp311-cp311-x.whl", "b-cp311-cp311-x.whl"]])
def test_a_wheel_for_another_python_or_two(tmp_path: Path, wheels: list[str]) -> None:
    python = tmp_path / "emulated-boards" / "system" / "usr" / "bin" / "python3"
    python.parent.mkdir(parents=True)
    python.with_name("python3.11").touch()
    python.symlink_to("python3.11")
    code, [line] = run(*wheels, "--cache", tmp_path)
    assert code == 1
    assert "cp311" in line
