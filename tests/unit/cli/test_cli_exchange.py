"""``fedbpt export`` and ``fedbpt import``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedbpt import Prompt, cli
from fedbpt.cli import export as export_command
from fedbpt.cli import import_ as import_command
from tests.support.toy_task import TASK, TASK_FILE
from tests.unit.exchange.test_exchange import Llama, foreign
from tests.unit.prompts.test_prompt import READOUT, as_of_format_1, make

PROMPT = make(labels=TASK.labels, template=TASK.templates[0], task_name=TASK.name, task=TASK, **READOUT)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for command in (export_command, import_command):
        monkeypatch.setattr(command, "load_model", lambda _name: Llama())
    (tmp_path / "mood.toml").write_text(TASK_FILE)
    PROMPT.save(tmp_path / "p.safetensors")
    as_of_format_1(PROMPT.save(tmp_path / "old.safetensors"))
    foreign(tmp_path / "foreign", np.zeros((2, 8), np.float32))
    return tmp_path


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert isinstance(caught.value.code, int)
    return (caught.value.code, *capfd.readouterr())


PEFT = ("export", "p.safetensors", "--to", "peft", "-m", "toy", "--base", "someone/toy", "-o", "a")
BACK = ("import", "a", "-m", "toy", "-o", "new/back.safetensors")


def test_to_peft_and_back(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capfd, *PEFT)
    assert (code, out) == (0, "a\n")
    assert len(err.splitlines()) == 2
    code, out, err = run(capfd, *BACK)
    assert (code, out) == (0, "new/back.safetensors\n")
    assert "Prompt('toy-mood' for 'toy'" in err
    assert Prompt.load("new/back.safetensors") == PROMPT
    assert run(capfd, *PEFT[:-2], "-t", "mood.toml", "-o", "b")[:2] == (0, "b\n")
    assert Path("b/README.md").read_text() == Path("a/README.md").read_text()


@pytest.mark.parametrize("command", [PEFT, BACK])
def test_quiet_prints_only_the_path(capfd: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    run(capfd, *PEFT)
    code, out, err = run(capfd, *command, "--quiet")
    assert (code, out, err) == (0, f"{command[-1]}\n", "")


def test_json(capfd: pytest.CaptureFixture[str]) -> None:
    said = json.loads(run(capfd, *PEFT, "--json")[1])
    assert (said["path"], said["card_path"], len(said["notes"])) == ("a", "a/README.md", 2)
    said = json.loads(run(capfd, *BACK, "--json")[1])
    assert said == {"prompt_path": "new/back.safetensors", "card_path": "new/back.safetensors.md"}
    assert Path(said["card_path"]).is_file()


@pytest.mark.parametrize("to", ["npy", "gguf"])
def test_files_need_no_model_and_make_their_folder(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    monkeypatch.setattr(export_command, "load_model", lambda _name: pytest.fail("loads the model"))
    code, out, _ = run(capfd, "export", "p.safetensors", "--to", to, "-o", f"new/p.{to}", "--json")
    said = json.loads(out)
    assert code == 0
    assert Path(said["card_path"]).is_file()
    if to == "npy":
        assert np.array_equal(np.load(said["path"]), PROMPT.rows)


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("export", "p.safetensors", "--to", "onnx", "-o", "x"), 2, "'--to'"),
        (("export", "p.safetensors", "-o", "x"), 2, "'--to'"),
        (("export", "none", "--to", "npy", "-o", "x"), 1, "none"),
        (("export", "p.safetensors", "--to", "peft", "-o", "x"), 2, "--model"),
        (("export", "old.safetensors", "--to", "peft", "-o", "x", "-m", "toy"), 2, "--task"),
        (("export", "p.safetensors", "--to", "peft", "-o", "x", "-m", "t"), 2, "--base"),
        (("import", "foreign", "-m", "toy", "-o", "x"), 2, "--task"),
        (("import", "none", "-m", "toy", "-t", "mood.toml", "-o", "x"), 1, "adapter_config.json"),
        (("import", "none", "-m", "toy", "-t", "bogus", "-o", "x"), 2, "bogus"),
        (("import", "none", "-m", "toy", "-t", "mood.toml", "-o", "x", "--template", "-1"), 2, "'--template'"),
    ],
)
def test_errors_are_one_line(
    capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, named: str
) -> None:
    found, out, err = run(capfd, *arguments)
    assert (found, out) == (code, "")
    assert err.count("\n") == 1
    assert named in err
    assert not Path("x").exists()
