"""A command that fails leaves no files behind, and the corrected command works."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedbpt import exchange
from fedbpt.cli.credentials import credentials_for
from fedbpt.device.agent import calls
from fedbpt.errors import ConfigError, FedbptError
from fedbpt.machine.files import write_whole
from fedbpt.net import certs, tokens
from fedbpt.net.tls import Tls
from fedbpt.net.tokens import Credentials
from fedbpt.runs.store import RoundHistory
from fedbpt.runs.tensorboard import write_scalars
from tests.unit.cli.test_cli import Run, folder, run
from tests.unit.prompts.test_prompt import make

__all__ = ["folder", "run"]


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_after(calls: int) -> Callable[..., None]:
    left = [calls]

    def fsync(_descriptor: int) -> None:
        if not left[0]:
            full()
        left[0] -= 1

    return fsync


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 2])
def test_files_that_belong_together_are_all_written_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    files = {tmp_path / name: name.encode() for name in ("a", "b", "c")}
    (tmp_path / "b").write_bytes(b"before")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_after(after))
        with pytest.raises(OSError, match="No space left") as caught:
            write_whole(files)
    assert caught.value.filename == str(tmp_path / "abc"[after])
    assert everything(tmp_path) == ["b"]
    assert (tmp_path / "b").read_bytes() == b"before"
    write_whole(files, private=[tmp_path / "c"])
    assert [path.read_bytes() for path in files] == [b"a", b"b", b"c"]
    assert everything(tmp_path) == ["a", "b", "c"]
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "a").stat().st_mode & 0o400


def test_a_file_that_cannot_be_renamed_undoes_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed = Path.replace

    def refuse(source: Path, target: Path) -> Path:
        return renamed(source, target) if target.name == "a" else full()  # type: ignore[return-value]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(OSError, match="No space left"):
            write_whole({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole({tmp_path / "a": b"1", tmp_path / "folder": b"2"})
    assert everything(tmp_path) == ["folder"]


# --- certificates ----------------------------------------------------------------------------------------------------

BAD_HOSTS = ["ü.lan", "a b", "http://c.lan", "c.lan:8400", "[::1]", "", "-" * 64, "a..b", "x" * 254, "c.lan\n"]


@pytest.mark.parametrize("bad", BAD_HOSTS)
def test_an_invalid_host_leaves_no_files_and_the_corrected_command_works(run: Run, folder: Path, bad: str) -> None:
    code, out, err = run("certs", "init", "--host", "c.lan", f"--host={bad}", "--host", "192.168.1.10")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert everything(folder) == []
    assert run("certs", "init", "--host", "c.lan", "--host", "*.example.com", "--quiet").code == 0
    before = everything(folder)
    assert run("certs", "issue", "pi5", "--host", "pi5.lan", f"--host={bad}").code == 2
    assert everything(folder) == before
    assert run("certs", "issue", "pi5", "--host", "pi5.lan").code == 0


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_full_disk_leaves_no_certificate(folder: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_after(after))
        with pytest.raises(ConfigError, match="No space left"):
            certs.init(folder, {"coordinator": ["c.lan"]})
    assert everything(folder) == []
    certs.init(folder, {"coordinator": ["c.lan"]})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_after(after % 2))
        with pytest.raises(ConfigError, match="No space left"):
            certs.issue(folder, "pi5")
    assert len(everything(folder)) == 4
    certs.issue(folder, "pi5")


def test_existing_files_are_found_before_anything_is_written(run: Run, folder: Path) -> None:
    (folder / "certs").mkdir()
    (folder / "certs" / "coordinator.key").write_text("somebody's")
    assert "certs/coordinator.key" in run("certs", "init").err
    assert everything(folder) == ["certs", "certs/coordinator.key"]
    (folder / "certs" / "coordinator.key").unlink()
    assert run("certs", "init").code == 0
    assert run("certs", "issue", "../elsewhere").code == 2
    for damaged in ("ca.key", "ca.pem"):
        content = (folder / "certs" / damaged).read_bytes()
        (folder / "certs" / damaged).write_bytes(b"-----BEGIN")
        code, _, err = run("certs", "issue", "pi5")
        assert (code, err.count("\n")) == (2, 1)
        assert "`fedbpt certs init`" in err
        (folder / "certs" / damaged).write_bytes(content)
    assert run("certs", "issue", "pi5").code == 0


# --- other commands --------------------------------------------------------------------------------------------------


def test_a_task_file_is_complete_or_absent(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "data.csv").write_text("text,label\nfine,good\nawful,bad\ngreat,good\nsad,bad\n")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        code, _, err = run("tasks", "new", "data.csv", "--out", "mood.toml")
    assert (code, err) == (1, "fedbpt: mood.toml: No space left on device\n")
    assert everything(folder) == ["data.csv"]
    assert run("tasks", "new", "data.csv", "--out", "mood.toml").code == 0


def test_an_invalid_device_name_creates_no_registry(run: Run, folder: Path) -> None:
    assert run("devices", "invite", "a b").code == 2
    assert everything(folder) == []
    assert run("devices", "invite", "ab").code == 0


def test_scalars_are_all_written_or_none(tmp_path: Path) -> None:
    line = RoundHistory(1, "2026-01-01T00:00:00+00:00", ("a",), (), {}, {"loss": 1.0})
    bad = line._replace(closed="no time")
    with pytest.raises(ValueError, match="no time"):
        write_scalars([line, bad], tmp_path / "run")
    assert everything(tmp_path / "run") == []
    write_scalars([line], tmp_path / "run")
    assert len(everything(tmp_path / "run")) == 1


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("to", ["prompt", "npy", "gguf"])
def test_a_prompt_is_saved_completely_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Any, after: int
) -> None:
    def save() -> None:
        if to == "prompt":
            make().save(tmp_path / "p")
        else:
            exchange.export_prompt(make(), tmp_path / "p", to)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_after(after))
        with pytest.raises(FedbptError, match="No space left"):
            save()
    assert everything(tmp_path) == []
    save()
    assert everything(tmp_path) == ["p", "p.md"]


# --- enrolment -------------------------------------------------------------------------------------------------------

URL = "https://c.lan:8400"


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The codes that were used, each once."""
    used: list[str] = []

    def enrol(url: str, code: str, **_: object) -> Credentials:
        assert code not in used, "used already"
        used.append(code)
        return Credentials(url, "pixel", "secret")

    monkeypatch.setattr(calls, "enrol", enrol)
    return used


def test_a_code_is_not_used_if_its_token_cannot_be_saved(coordinator: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "token", tmp_path / "folder"):
        with pytest.raises(ConfigError, match=str(tmp_path)):
            credentials_for(URL, "CODE", path, Tls(), False)
    assert coordinator == []
    assert credentials_for(URL, "CODE", tmp_path / "token", Tls(), False) == Credentials.load(tmp_path / "token")
    assert sorted(everything(tmp_path)) == ["file", "folder", "token"]


def test_the_same_command_enrols_once_and_another_code_again(coordinator: list[str], tmp_path: Path) -> None:
    path = tmp_path / "token"
    first = credentials_for(URL, "K7QF-2M4P", path, Tls(), False)
    assert credentials_for(URL, "k7qf2m4p", path, Tls(), False) == first
    assert credentials_for(URL, None, path, Tls(), False) == first
    assert coordinator == ["K7QF-2M4P"]
    credentials_for(URL, "ANOTHER", path, Tls(), False)
    credentials_for("https://d.lan:8400", "THIRD", path, Tls(), False)
    assert coordinator == ["K7QF-2M4P", "ANOTHER", "THIRD"]
    assert b"K7QF" not in path.read_bytes()


def test_a_damaged_file_is_replaced_by_a_new_enrolment(coordinator: list[str], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("damaged")
    assert credentials_for(URL, "CODE", tmp_path / "token", Tls(), False) == Credentials.load(tmp_path / "token")
    assert coordinator == ["CODE"]


def test_credentials_of_earlier_versions_are_read(tmp_path: Path) -> None:
    tokens.write_private(tmp_path / "token", b'{"coordinator":"https://c.lan:8400","device":"pixel","secret":"s"}')
    assert credentials_for(URL, None, tmp_path / "token", Tls(), False) == Credentials(URL, "pixel", "s")
