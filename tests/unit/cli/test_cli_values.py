"""The command line with any value for any option: it works, or reports an error in one line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from fedbpt import cli
from fedbpt.errors import ConfigError
from fedbpt.net import server
from fedbpt.tasks import write_rows
from tests.support.toy_task import TASK, TASK_FILE, rows

pytestmark = pytest.mark.slow

NUMBERS = ("-1", "0.5", "1e999", "nan", "9" * 30, "9" * 5000)
TEXTS = ("", "--", ".", "/", "absent/file", "binary", "x" * 300, "half \udcff", "é\n", "~nobody/x")
ADDRESSES = ("pi5", ":8400", "127.0.0.1:99999", "[::1", "http://", "http://pi5:99999", "ftp://pi5:1")
VALUES = (*NUMBERS, *TEXTS, *ADDRESSES)


def leaves() -> Iterator[tuple[str, Any]]:
    def walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        below = getattr(command, "commands", None)
        if below is None:
            yield " ".join(words), command
        for word, inner in (below or {}).items():
            yield from walk(inner, (*words, word))

    return walk(get_command(cli.make_app()), ())


COMMANDS = dict(leaves())
FETCHES = {("demo", "model")}  # would download the news
PARAMETERS = [
    (name, parameter.name)
    for name, command in COMMANDS.items()
    for parameter in command.params
    if not getattr(parameter, "is_flag", False) and (name, parameter.name) not in FETCHES
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("FEDBPT_CACHE", "HOME", "XDG_CONFIG_HOME", "FEDBPT_CREDENTIALS"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    write_rows("rows.jsonl", rows(8), TASK.labels)
    (tmp_path / "mood.toml").write_text(TASK_FILE)
    (tmp_path / "run.toml").write_text('task = "mood.toml"')
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    monkeypatch.setattr("fedbpt.cli.coordinator._work", lambda *_: None)  # it would serve until Ctrl-C
    monkeypatch.setattr("fedbpt.coordinator.service.server.CoordinatorServer.start", lambda _: None)
    return tmp_path


def arguments(name: str, changed: str, value: str) -> list[str]:
    """A command with ``value`` for one parameter, and without a model, so that it does no work."""
    usual = {"data": "rows.jsonl", "task": "mood.toml", "model": "absent.gguf", "run_file": "run.toml", "to": "npy"}
    words, given = [], []
    for parameter in COMMANDS[name].params:
        if parameter.name == changed:
            chosen = value
        elif parameter.required or parameter.name == "model":
            chosen = usual.get(parameter.name, "absent")
        else:
            continue
        if parameter.param_type_name == "argument":
            words += [chosen] * max(parameter.nargs, 1)
        else:
            given.append(f"{parameter.opts[0]}={chosen}")
    return [*name.split(), *given, *(["--", *words] if words else [])]


@pytest.mark.parametrize(("name", "parameter"), PARAMETERS)
def test_any_value_of_an_option_is_used_or_rejected_in_one_line(
    name: str, parameter: str, capfd: pytest.CaptureFixture[str]
) -> None:
    faults = []
    for value in VALUES:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments(name, parameter, value))
        said = capfd.readouterr().err
        if name == "models check" and ended.value.code == 1 and not said:
            continue  # a failed check is a result, not an error
        one_line = said.startswith("fedbpt: ") and len(said.splitlines()) == 1 and "unexpected " not in said
        if ended.value.code not in (0, 1, 2) or (ended.value.code and not one_line):
            faults.append(f"{value!r:.40}: {ended.value.code}: {said!r:.300}")
    assert "\n".join(faults) == ""


@pytest.mark.parametrize("host", ["", "256.1.1.1", "pi 5", "http://127.0.0.1", "x" * 300, "[::1", "half \udcff"])
def test_a_server_rejects_an_invalid_host(host: str) -> None:
    with pytest.raises(ConfigError) as refused:
        server._bind(host, 0, None)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "given",
    [
        ("tune", "--task", "mood.toml", "--model", "absent.gguf", "--data", "rows.jsonl", "--seconds", "nan"),
        ("device", "--task", "mood.toml", "--model", b"\xff.gguf", "--data", "rows.jsonl"),
        ("tune", b"\xff.toml"),
        ("evaluate", ".", "--data", "binary"),
    ],
)
def test_errors_of_a_process_are_one_line(given: tuple[str | bytes, ...]) -> None:
    done = subprocess.run([sys.executable, "-m", "fedbpt", *given], capture_output=True, check=False)
    said = done.stderr.decode()
    assert (done.returncode in (1, 2), said.startswith("fedbpt: "), len(said.splitlines())) == (True, True, 1), said
    assert "unexpected" not in said
