"""Model files with mutated headers are used, or refused in one line; none ends the process that loads it."""

from __future__ import annotations

import os
import random
import select
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedbpt import _native
from fedbpt.errors import ModelFileError
from fedbpt.models import trial
from tests.faults import model_trier
from tests.faults.conftest import ALL
from tests.faults.mutations import mutated, sources

FILES = 100_000 if ALL else 300
SEED = 5
WAIT_S = 240.0  # per file, on a busy machine
ROOT = Path(__file__).parents[2]


class Worker:
    """A process that reads paths and prints lines; restarted if it has died."""

    def __init__(self, module: str, *arguments: str, until: str | None = None) -> None:
        self._command = [sys.executable, "-m", f"tests.faults.{module}", *arguments]
        self._until = until  # the last line of a reply; None: a reply has one line
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, path: Path) -> tuple[list[str], int | None]:
        """Send a path; returns the lines of the reply, and the exit status if the process ended."""
        if self._process is None:
            environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=environment,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        assert self._process.stdin is not None
        self._process.stdin.write(os.fsencode(path) + b"\n")
        lines = list(self._lines(self._process))
        complete = bool(lines) and self._until in (None, lines[-1])
        return lines, None if complete else self.end()

    def _lines(self, process: subprocess.Popen[bytes]) -> Iterator[str]:
        assert process.stdout is not None
        pending = b""
        while True:
            ready, _, _ = select.select([process.stdout], [], [], WAIT_S)
            if not ready:
                process.kill()
            data = process.stdout.read(1 << 16)
            *whole, pending = (pending + data).split(b"\n")
            for line in whole:
                yield line.decode(errors="replace")
                if self._until in (None, line.decode(errors="replace")):
                    return
            if not data:
                return

    def end(self) -> int | None:
        """End the process, if there is one; returns its exit status."""
        if self._process is None:
            return None
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        status = self._process.wait()
        self._process = None
        return status


@pytest.fixture
def trier() -> Iterator[Worker]:
    worker = Worker("model_trier", str(_native.__file__), until="next")
    yield worker
    worker.end()


@pytest.fixture
def user() -> Iterator[Worker]:
    worker = Worker("model_user")
    yield worker
    worker.end()


def check_refusal(line: str, path: Path) -> None:
    kind, reason = line.removeprefix("refused ").split(" ", 1)
    assert kind in ("ModelFileError", "UnsupportedModelError"), line
    assert path.name in reason, line


@pytest.mark.timeout(24 * 3600 if ALL else 300)
def test_no_model_file_ends_the_process_that_loads_it(
    tmp_path: Path, trier: Worker, user: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that ends the trial's process is refused; one that passes is safe in a long-lived process."""
    monkeypatch.setattr(trial, "_CPU_S", model_trier.CPU_S)
    models = sources(tmp_path)
    seen: Counter[str] = Counter()
    ends: Counter[tuple[int, str]] = Counter()
    for i in range(FILES):
        rng = random.Random(f"{SEED} {i}")
        name = rng.choice(list(models))
        path = tmp_path / f"{i}-{name}.gguf"  # kept if an assertion below fails
        path.write_bytes(mutated(rng, models[name]))
        lines, status = trier.ask(path)
        if status is not None:
            seen["ended"] += 1
            end = (status, lines[-1] if lines else "")
            ends[end] += 1
            if ends[end] == 1:
                with pytest.raises(ModelFileError) as failed:
                    trial.run(path)
                check_refusal(f"refused ModelFileError {failed.value}", path)
                assert len(str(failed.value).splitlines()) == 1
        elif lines[-2] == "passed":
            used, status = user.ask(path)
            assert status is None, (path, used, status)
            assert len(used) == 1, (path, used)
            if used != ["used"]:
                check_refusal(used[0], path)
            seen["used"] += used == ["used"]
        else:
            check_refusal(lines[-2], path)
            seen["refused"] += 1
        path.unlink()
    print(seen, ends)
    assert min(seen["used"], seen["refused"]) > FILES / 10, seen
