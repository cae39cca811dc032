"""The user's folders: without a home, with one that cannot be written, and where none is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedbpt import models
from fedbpt.errors import ConfigError
from fedbpt.machine import folders
from fedbpt.net.tokens import default_credentials
from tests.support.raises import raises

pytestmark = pytest.mark.slow

# what a container's user is that has a number and no account
HOMELESS = "import pwd, os\ndef none(*_): raise KeyError\npwd.getpwuid = pwd.getpwnam = none\n"


def test_the_cache_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDBPT_CACHE", str(tmp_path))
    assert folders.cache_folder() == tmp_path
    monkeypatch.delenv("FEDBPT_CACHE")
    assert folders.cache_folder().name == "fedbpt"


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "FEDBPT_CACHE", "FEDBPT_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)

    def refuse() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", refuse)
    monkeypatch.setattr(Path, "expanduser", lambda path: refuse() if str(path).startswith("~") else path)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_only_environment_variables_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for path, remedy in ((folders.cache_folder, "FEDBPT_CACHE"), (default_credentials, "--credentials FILE")):
        with raises(ConfigError) as caught:
            path()
        assert remedy in str(caught.value)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/config")
    assert (folders.cache_folder().parent, default_credentials().parent) == (Path("/cache"), Path("/config/fedbpt"))
    monkeypatch.setenv("FEDBPT_CACHE", "/mine")
    monkeypatch.setenv("FEDBPT_CREDENTIALS", "/token")
    assert (folders.cache_folder(), default_credentials()) == (Path("/mine"), Path("/token"))


@pytest.mark.usefixtures("homeless")
@pytest.mark.parametrize("path", ["~/m.gguf", "~nobody-of-this-name/m.gguf"])
def test_a_path_in_a_missing_home_is_named(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDBPT_CACHE", "/mine")
    for use in (folders.expanded, models.locate):
        with raises(ConfigError) as caught:
            use(path)
        assert path in str(caught.value)


IN_BASH = 'import shellingham\nshellingham.detect_shell = lambda *_: ("bash", "/bin/bash")\n'
"""The tests may run without a shell."""


def fedbpt(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a new process whose user has no home."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    program = f"{HOMELESS}{IN_BASH}from fedbpt.cli import main\nmain({list(arguments)!r})"
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env={**kept, **environment}
    )


def test_a_process_without_a_home_lists_models_where_the_cache_is_set(tmp_path: Path) -> None:
    for variable in ("FEDBPT_CACHE", "XDG_CACHE_HOME"):
        listed = fedbpt("models", "list", "--quiet", **{variable: str(tmp_path)})
        assert (listed.returncode, listed.stderr) == (0, ""), listed.stderr
        assert "smollm2-135m" in listed.stdout
    refused = fedbpt("models", "list")
    assert refused.returncode == 2
    assert "FEDBPT_CACHE" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_library_that_needs_a_home_fails_in_one_line() -> None:
    asked = fedbpt("--install-completion")
    assert asked.returncode in (1, 2)
    assert "Traceback" not in asked.stderr
    assert "unexpected" not in asked.stderr
    assert asked.stderr.count("\n") == 1


def test_a_device_that_is_called_needs_no_home(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "World"}\n')
    arguments = ("device", "--model", "smollm2-135m", "--data", str(tmp_path / "rows.jsonl"), "--task", "ag-news")
    ended = fedbpt(*arguments, FEDBPT_CACHE=str(tmp_path))
    assert "fedbpt models pull smollm2-135m" in ended.stderr
    environment = {"FEDBPT_CACHE": str(tmp_path), "FEDBPT_CREDENTIALS": str(tmp_path / "token")}
    assert "home" not in fedbpt(*arguments, "--coordinator", "http://127.0.0.1:1", **environment).stderr


def test_a_home_that_cannot_be_written_lists_models(tmp_path: Path) -> None:
    # a file where the folder should be: nobody can write below it, not even root
    (tmp_path / "home").touch()
    listed = fedbpt("models", "list", "--quiet", HOME=str(tmp_path / "home"))
    assert (listed.returncode, listed.stderr) == (0, "")
    pulled = fedbpt("models", "pull", "smollm2-135m", "--quiet", HOME=str(tmp_path / "home"))
    assert pulled.returncode == 1
    assert "FEDBPT_CACHE" in pulled.stderr
    assert pulled.stderr.count("\n") == 1
