"""Start the processes of a test and end them with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest

ROOT = Path(__file__).parents[2]


class Fleet:
    """The processes of a test; `end` kills them and closes their pipes."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen[str]] = []

    def spawn(
        self,
        *arguments: object,
        cwd: Path = ROOT,
        python: Path | str = sys.executable,
        stdout: IO[str] | int = subprocess.PIPE,
        stderr: IO[str] | int = subprocess.PIPE,
    ) -> subprocess.Popen[str]:
        """Start ``python -m ARGUMENTS`` with the package of this source tree; an emulated ``python`` has its own."""
        paths = [str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        process = subprocess.Popen(
            [python, "-m", *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=stderr,
            text=True,
        )
        self.started.append(process)
        return process

    def devices(self, *arguments: tuple[str, ...]) -> list[tuple[subprocess.Popen[str], str]]:
        """Start toy devices together; returns each with its URL, when all are ready."""
        processes = [self.spawn("tests.integration.toy_device", *given) for given in arguments]
        return [(process, ready(process)) for process in processes]

    def end(self) -> None:
        for process in self.started:
            running = process.poll() is None
            if running:
                process.kill()
            _, err = process.communicate(timeout=10)
            end = "ran to the end" if running else f"ended by itself ({process.returncode})"
            print(f"{process.args}: {end}\n{err or ''}")  # shown if the test fails


def ready(process: subprocess.Popen[str]) -> str:
    """The URL that a device process announces."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        pytest.fail(f"the device did not start: {process.communicate(timeout=10)[1]}")
    announced: dict[str, Any] = json.loads(line)
    return str(announced["ready"]["url"])
