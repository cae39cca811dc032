"""A run is locked for one process: real processes, one of which is killed."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedbpt import Budget, PromptSpec, TuneResult, tune
from fedbpt.errors import StoreError
from fedbpt.runs.events import Event, RoundClosed
from fedbpt.runs.store import RunStore
from tests.support.raises import raises
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, TASK_FILE, rows
from tests.unit.cli.test_cli import Run, folder, run

__all__ = ["folder", "run"]

ROOT = Path(__file__).resolve().parents[3]

ENDLESS = """
import sys
from fedbpt.runs.events import RoundClosed
from tests.unit.runs.test_run_lock import tuned

def ready(event):
    if isinstance(event, RoundClosed) and event.searched == 2:
        print("ready", flush=True)

tuned(sys.argv[1], evaluations=10**9, on_event=ready)
"""


def tuned(store: str | Path, evaluations: int = 32, run: str = "tune", **options: object) -> TuneResult:
    budget = Budget(evaluations=evaluations)
    given = {"budget": budget, "prompt": PromptSpec(d=6), "popsize": 8, "show": False, **options}
    return tune(ToyScorer(), TASK, rows(24), store=store, run=run, **given)  # type: ignore[arg-type]


@contextmanager
def running(store: Path) -> Iterator[subprocess.Popen[str]]:
    """A process within a run that does not end by itself."""
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS, store], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def locks(folder: Path) -> list[Path]:
    return list(folder.glob("*.lock"))


def test_a_run_of_another_process_is_refused_until_that_one_ends(tmp_path: Path) -> None:
    store, events = tmp_path / "runs.db", list[Event]()
    link = tmp_path / "elsewhere" / "link.db"
    link.parent.mkdir()
    link.symlink_to(store)
    with running(store) as process:
        for path in (store, link):
            with pytest.raises(StoreError) as caught:
                tuned(path, on_event=events.append)
            assert caught.value.field == "run"
            assert all(value in str(caught.value) for value in ("'tune'", str(path), str(process.pid)))
        assert events == []
        assert tuned(store, run="other").run.rounds == 4  # of the same store
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(locks(tmp_path)) == 1  # it was left behind, and locks nothing
        with RunStore(store) as opened:
            closed = opened.get_run("tune").n_rounds
        assert tuned(store, evaluations=8 * closed + 8).run.rounds >= 3
    assert locks(tmp_path) == locks(link.parent) == []


def test_the_command_line_refuses_it_too(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedbpt.cli import tune as tune_command

    monkeypatch.setattr(tune_command, "load_model", lambda *_args, **_options: ToyScorer())
    (folder / "mood.toml").write_text(TASK_FILE)
    (folder / "train.jsonl").write_text(
        "".join(f'{{"text": "{text}", "label": {label}}}\n' for text, label in rows(24))
    )
    command = ("tune", "--model", "toy", "--task", "mood.toml", "--data", "train.jsonl", "--store", "runs.db", "--run")
    with running(folder / "runs.db") as process:
        refused = [run(*command, "tune"), run(*command, "tune", "--fresh")]
        refused.append(run("runs", "delete", "tune", "--store", "runs.db", "--force"))
        for code, out, err in refused:
            assert (code, out) == (1, "")
            assert err.startswith("fedbpt: ")
            assert all(value in err for value in ("'tune'", "runs.db", str(process.pid)))
            assert err.count("\n") == 1
    assert run("runs", "delete", "tune", "--store", "runs.db", "--force").code == 0


def test_a_second_call_of_the_same_process_is_refused_as_well(tmp_path: Path) -> None:
    refused: list[str] = []

    def second() -> None:
        with pytest.raises(StoreError) as caught:
            tuned(tmp_path / "runs.db")
        refused.append(str(caught.value))

    def listen(event: Event) -> None:
        if isinstance(event, RoundClosed) and event.searched == 1:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    first = tuned(tmp_path / "runs.db", on_event=listen)
    assert first.run.rounds == 4
    assert len(refused) == 1
    assert str(os.getpid()) not in refused[0]  # it says "this process"
    assert tuned(tmp_path / "runs.db").run == first.run


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EACCES])
def test_without_file_locks_a_run_continues_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    if number == errno.EACCES:
        with raises(StoreError, field="run"):
            tuned(tmp_path / "runs.db")
    else:
        assert tuned(tmp_path / "runs.db").run.rounds == 4
        assert "'tune'" in caplog.text


def test_of_many_that_start_at_once_only_one_runs(tmp_path: Path) -> None:
    outcomes: list[object] = []
    begin = threading.Barrier(6)

    def work() -> None:
        with RunStore(tmp_path / "runs.db") as store:
            for _ in range(50):
                begin.wait()
                try:
                    with store.held("r"):
                        inside.append(True)
                        outcomes.append(len(inside))
                        inside.pop()
                except StoreError:
                    outcomes.append("refused")

    inside: list[bool] = []
    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(outcomes) <= {1, "refused"}
    assert outcomes.count(1) >= 50
    assert len(outcomes) == 300
    assert locks(tmp_path) == []
