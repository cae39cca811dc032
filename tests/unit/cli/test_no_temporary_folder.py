"""A machine without a folder for temporary files: most functions work, the others name the variable to set."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedbpt import Budget, PromptSpec, cli, evaluate, exchange, tune
from fedbpt.coordinator.devices.enrolment import DeviceRegistry
from fedbpt.runs.store import RunStore
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK, rows
from tests.unit.prompts.test_prompt import make


@contextmanager
def nowhere(folder: Path) -> Iterator[None]:
    """Make temporary files impossible within the block; pytest needs them outside."""
    (folder / "file").touch()
    beyond = str(folder / "file" / "tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", None)
        patch.setattr(tempfile, "_candidate_tempdir_list", lambda: [beyond])
        for name in ("TMPDIR", "SQLITE_TMPDIR"):
            patch.setenv(name, beyond)
        with pytest.raises(FileNotFoundError, match="No usable temporary directory"):
            tempfile.gettempdir()
        yield


def test_most_functions_need_no_temporary_folder(tmp_path: Path) -> None:
    with nowhere(tmp_path):
        given = {"budget": Budget(evaluations=32), "prompt": PromptSpec(d=6), "popsize": 8, "show": False}
        kept = tune(ToyScorer(), TASK, rows(24), store=tmp_path / "runs.db", **given)  # type: ignore[arg-type]
        passing = tune(ToyScorer(), TASK, rows(24), **given)  # type: ignore[arg-type]
        assert passing.prompt == kept.prompt
        assert (passing.curve, passing.run.digest) == (kept.curve, kept.run.digest)
        assert evaluate(ToyScorer(), TASK, rows(12), passing.prompt).n == 12
        make().save(tmp_path / "p.safetensors")
        exchange.export_prompt(make(), tmp_path / "p.npy", "npy")
        exchange.export_prompt(make(), tmp_path / "p.gguf", "gguf")
        with DeviceRegistry(tmp_path / "devices.db") as registry:
            assert registry.invite("pixel")


def test_a_run_without_a_store_writes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = list(tmp_path.rglob("*"))
    tune(ToyScorer(), TASK, rows(24), budget=Budget(evaluations=16), popsize=8, show=False)
    with RunStore(None) as one, RunStore(None) as other, one.held("r"), other.held("r"):
        one.delete_run("r")
    assert list(tmp_path.rglob("*")) == before


def test_commands_that_need_one_name_the_variable_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def command(_given: object) -> None:
        with nowhere(tmp_path):
            tempfile.mkdtemp()

    monkeypatch.setattr(cli, "_run", command)
    with pytest.raises(SystemExit) as caught:
        cli.main(["models", "list"])
    assert caught.value.code == 1
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "TMPDIR" in err
