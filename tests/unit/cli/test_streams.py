"""Commands as processes with unusual standard streams: closed, full, or not UTF-8."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.toy_task import rows
from tests.unit.prompts.test_prompt import make

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
NAME = "Stimmung – état 🙂"  # the task's: in none of the narrow encodings

PROGRAM = """
import sys
import fedbpt.cli.evaluate, fedbpt.cli.tune
from fedbpt.cli import main
from tests.support.toy_scorer import ToyScorer
for command in ("evaluate", "tune"):
    sys.modules[f"fedbpt.cli.{command}"].load_model = lambda *_, **__: ToyScorer(name="gr\\u00f6\\u00dfer")
main(sys.argv[1:])
"""

TASK = f"""
name = "{NAME}"
labels = ["bad", "good"]
[[templates]]
pattern = "{{text}}\\nMood:"
label_words = [" bad", " good"]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(task_name=NAME).save(tmp_path / "p.safetensors")
    (tmp_path / "task.toml").write_text(TASK, encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"text": "{text}", "label": "{("bad", "good")[int(label)]}"}}\n' for text, label in rows(12))
    )
    return tmp_path


EVALUATE = ("evaluate", "p.safetensors", "--data", "rows.jsonl", "--task", "task.toml", "--model", "toy")
TUNE = ("tune", "--task", "task.toml", "--data", "rows.jsonl", "--model", "toy", "--evaluations", "64")


def begin(folder: Path, *arguments: str, closed: tuple[int, ...] = (), **options: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FEDBPT_CACHE": str(folder), **options.pop("env", {})}

    def close() -> None:
        for number in closed:
            os.close(number)

    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": close, **options}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], cwd=folder, env=environment, **given)


def ended(process: subprocess.Popen[bytes]) -> tuple[int, bytes, bytes]:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out or b"", err or b""


NARROW = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "strict ascii": {"PYTHONIOENCODING": "ascii:strict"},
    "surrogateescape": {"PYTHONIOENCODING": "ascii:surrogateescape"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "cp1252": {"PYTHONIOENCODING": "cp1252:strict"},
    "the C locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "no locale": {"LC_ALL": "xx_XX", "LANG": "", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


@pytest.mark.parametrize("how", NARROW)
def test_output_that_is_not_utf_8_loses_no_result(folder: Path, how: str) -> None:
    code, out, err = ended(begin(folder, *EVALUATE, env=NARROW[how]))
    assert (code, err) == (0, b"")
    assert b"zero-shot" in out
    assert b"tuned" in out
    assert b"Stimmung" in out
    assert b"\\ud83d\\ude42" in out  # the smile, escaped
    code, out, err = ended(begin(folder, *TUNE, env=NARROW[how]))
    assert code == 0, err
    assert b"Stimmung" in out
    encoding = NARROW[how].get("PYTHONIOENCODING", "ascii").partition(":")[0]
    code, out, err = ended(begin(folder, *TUNE, "--json", env=NARROW[how]))
    assert code == 0, err
    assert json.loads(out.decode(encoding))["task"] == NAME
    code, out, err = ended(begin(folder, *EVALUATE, "--task", "\udcff\u2013.toml", env=NARROW[how]))
    assert (code, out, err.count(b"\n")) == (2, b"", 1)


CLOSED: dict[str, dict[str, Any]] = {
    "closed stdout": {"closed": (1,), "stdout": None},
    "closed stderr": {"closed": (2,), "stderr": None},
    "all closed": {"closed": (0, 1, 2), "stdout": None, "stderr": None},
    "full stderr": {},
}


has_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")


@has_full
@pytest.mark.parametrize("how", CLOSED)
def test_a_closed_or_full_stream_loses_no_result(folder: Path, how: str) -> None:
    with Path("/dev/full").open("wb") as full:
        given = CLOSED[how] or {"stderr": full}
        code, out, err = ended(begin(folder, *EVALUATE, "--json", **given))
        assert (code, err) == (0, b"")
        assert (b'"zero_shot"' in out) == (given.get("stdout", 0) is not None)
        code, out, err = ended(begin(folder, *TUNE, "--out", "q.safetensors", **given))
    assert code == 0
    assert b"Traceback" not in err
    assert (folder / "q.safetensors").exists()
    code, out, _ = ended(begin(folder, "runs", "list"))  # nothing was printed into the database
    assert (code, out.count(b"finished")) == (0, 1)


def test_a_closed_pipe_prints_no_error(folder: Path) -> None:
    process = begin(folder, *EVALUATE)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    code, _, err = ended(process)
    assert (code, err) == (1, b"")


def test_a_run_continues_when_standard_error_is_closed(folder: Path) -> None:
    process = begin(folder, *TUNE)
    assert process.stderr is not None
    process.stderr.close()
    process.stderr = None
    code, out, _ = ended(process)
    assert code == 0
    assert b"Stimmung" in out


SCRIPT = """
from fedbpt import Budget, tune
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows
print(tune(ToyScorer(), TASK, rows(24), budget=Budget(evaluations=64), popsize=8).run.rounds)
"""


@has_full
@pytest.mark.parametrize("how", ["closed", "full", "unread"])
def test_tune_continues_when_standard_error_is_closed(how: str) -> None:
    def close() -> None:
        if how == "closed":
            os.close(2)

    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as unread, Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            stdout=subprocess.PIPE,
            stderr={"closed": None, "full": full, "unread": unread}[how],
            cwd=ROOT,
            check=False,
            preexec_fn=close,
        )
    assert (done.returncode, done.stdout) == (0, b"8\n")


@has_full
def test_a_full_disk_for_the_output_is_one_line(folder: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        code, _, err = ended(begin(folder, *EVALUATE, stdout=full))
    assert (code, err) == (1, b"fedbpt: No space left on device\n")


def test_signals_work_with_closed_streams(folder: Path) -> None:
    endless = (*TUNE[:-1], "1000000000", "--run", "endless", "--quiet", "--log", "log.jsonl")
    process = begin(folder, *endless, closed=(1,), stdout=None)
    log = folder / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 4):  # rounds are closed
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 130
