"""``fedbpt coordinator`` and the commands that reach it, without runs."""

from __future__ import annotations

import json
import shlex
import shutil
import stat
from pathlib import Path

import pytest

from fedbpt import cli
from fedbpt.cli import coordinator as command
from fedbpt.cli.hand_over import describe
from fedbpt.coordinator.service.remote_runs import RemoteRuns
from fedbpt.coordinator.service.run_queue import RunQueue
from fedbpt.coordinator.service.run_worker import RunWorker
from fedbpt.coordinator.service.server import CoordinatorServer
from fedbpt.runs.run_lock import sole_worker
from fedbpt.runs.submission import Job, Submission
from tests.support.toy_scene import ToyTask, settings
from tests.support.toy_task import TASK_FILE

pytestmark = pytest.mark.slow


def run(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code


def test_a_second_coordinator_in_the_same_folder_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with sole_worker(tmp_path / "queue.db", ""):
        assert run("coordinator", "--folder", str(tmp_path), "--listen", "127.0.0.1:0") == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1
    assert "--folder" in err


def test_a_new_folder_is_made_wherever_the_token_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "new" / "runs"
    monkeypatch.setattr(command, "_work", lambda *_: None)
    start = ("coordinator", "--folder", str(folder), "--listen", "127.0.0.1:0")
    assert run(*start, "--admin-token", str(tmp_path / "admin.token")) == 0
    assert (folder / "queue.db").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    start = ("coordinator", "--folder", str(tmp_path / "file"), "--listen", "127.0.0.1:0")
    assert run(*start, "--admin-token", str(tmp_path / "admin.token")) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1
    assert "--folder" in err


@pytest.mark.parametrize("fresh", [False, True])
def test_who_stops_following_is_told_how_to_go_on_and_how_to_cancel(
    fresh: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("certs", "init") == 0
    shutil.copytree("certs", "my certs")
    (tmp_path / "task.toml").write_text(TASK_FILE)
    said: list[str] = []

    def leave(*_: object) -> None:
        raise KeyboardInterrupt

    def ask(_worker: RunWorker, server: CoordinatorServer) -> None:
        to = ("--coordinator", server.url, "--admin-token", "runs/admin.token", "--ca", "my certs/ca.pem")
        words = ("tune", "--task", "task.toml", "--run", "r", *to, *(["--fresh"] if fresh else []))
        assert run(*words) == 130
        said.append(capfd.readouterr().err.splitlines()[-1])
        cancel = shlex.split(said[0].partition("fedbpt runs cancel")[2])
        assert cancel == ["r", *to]
        assert run("runs", "cancel", *cancel) == 0

    monkeypatch.setattr(RemoteRuns, "follow", leave)
    monkeypatch.setattr(command, "_work", ask)
    files = ("--cert", "certs/coordinator.pem", "--key", "certs/coordinator.key")
    assert run("coordinator", "--listen", "127.0.0.1:0", *files) == 0
    assert ("the same command without --fresh" in said[0]) == fresh


@pytest.mark.parametrize("option", ["--monitor-token", "--dashboard-token", "--registry"])
def test_options_of_the_runs_own_machine_are_refused(
    option: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ("--task", "ag-news", "--coordinator", "http://127.0.0.1:1", option, str(tmp_path / "file"))
    assert run("tune", *given) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1
    assert f"{option} cannot be combined with --coordinator" in err


def test_runs_are_listed_and_cancelled_over_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("certs", "init") == 0
    with RunQueue(tmp_path / "runs" / "queue.db") as queue:
        for name in ("one", "two"):
            queue.add(Submission(run=name, task=ToyTask(), settings=settings()))
    capfd.readouterr()
    said: list[str] = []

    def ask(_worker: RunWorker, server: CoordinatorServer) -> None:
        to = ("--coordinator", server.url, "--ca", "certs/ca.pem")
        for words in (("runs", "list", *to), ("runs", "list", *to, "--json"), ("runs", "cancel", "two", *to)):
            assert run(*words) == 0
            said.append(capfd.readouterr().out)

    monkeypatch.setattr(command, "_work", ask)
    files = ("--cert", "certs/coordinator.pem", "--key", "certs/coordinator.key")
    assert run("coordinator", "--listen", "127.0.0.1:0", *files) == 0
    table, listed, cancelled = said
    assert "queued (1 before it)" in table
    assert [job["run"] for job in json.loads(listed)] == ["one", "two"]
    assert cancelled == "run two: cancelled\n"
    assert stat.S_IMODE((tmp_path / "runs" / "admin.token").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("state", "ahead", "detail", "expected"),
    [
        ("queued", 0, "", "run r: queued, it is next"),
        ("queued", 1, "", "run r: queued, 1 run before it"),
        ("queued", 3, "", "run r: queued, 3 runs before it"),
        ("running", 0, "", "run r: running"),
        ("failed", 0, "no devices", "run r: failed, no devices"),
    ],
)
def test_a_state_is_a_line(state: str, ahead: int, detail: str, expected: str) -> None:
    job = Job(run="r", task="t", method="pooled", state=state, ahead=ahead, detail=detail)  # type: ignore[arg-type]
    assert describe(job) == expected
