"""``fedbpt models``."""

import json

import pytest
from typer.testing import CliRunner

from fedbpt import models
from fedbpt.cli.models import app
from fedbpt.errors import ModelNotFoundError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDBPT_CACHE", str(tmp_path))
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.parametrize("command", ["list", "pull", "path", "rm", "check", "requantize"])
def test_every_command_has_help_with_an_example_and_json_and_quiet(command):
    shown = run(command, "--help").output
    assert f"Example: fedbpt models {command}" in shown
    assert "--json" in shown
    assert "--quiet" in shown


def test_list_shows_the_catalogue():
    assert "smollm2-135m" in run("list").output
    assert run("list", "--quiet").output.split() == list(models.CATALOGUE)
    listed = json.loads(run("list", "--json").output)
    assert [entry["name"] for entry in listed] == list(models.CATALOGUE)
    assert {entry["downloaded"] for entry in listed} == {False}
    assert {entry["path"] for entry in listed} == {None}


@pytest.fixture
def pulled(tmp_path, monkeypatch):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")

    def pull(name, progress=None):
        assert name == "smollm2-135m"
        for done in (0, 5, 10):
            if progress is not None:
                progress(done, 10)
        return file

    monkeypatch.setattr(models, "pull", pull)
    monkeypatch.setattr(models, "locate", lambda _name: file)
    return file


@pytest.mark.parametrize("command", ["pull", "path"])
def test_pull_and_path_print_the_path_and_only_that_on_standard_output(command, pulled):
    assert run(command, "smollm2-135m").stdout == f"{pulled}\n"
    assert run(command, "smollm2-135m", "--quiet").output == f"{pulled}\n"
    answer = json.loads(run(command, "smollm2-135m", "--json").stdout)
    assert answer == {"name": "smollm2-135m", "path": str(pulled), "fingerprint": models.fingerprint(pulled)}


def test_pull_draws_its_bar_on_standard_error(pulled):
    result = run("pull", "smollm2-135m")
    assert "smollm2-135m" in result.stderr
    assert str(pulled) not in result.stderr


def test_errors_reach_the_caller():
    with pytest.raises(ModelNotFoundError, match="fedbpt models pull smollm2-135m"):
        run("path", "smollm2-135m")


def test_rm_prints_the_freed_size(monkeypatch):
    removed = []
    monkeypatch.setattr(models, "remove", lambda name: removed.append(name) or 98_400_000)
    assert "98.4 MB" in run("rm", "smollm2-135m").output
    assert json.loads(run("rm", "smollm2-135m", "--json").output) == {"name": "smollm2-135m", "freed_bytes": 98_400_000}
    assert run("rm", "smollm2-135m", "--quiet").output == ""
    assert removed == 3 * ["smollm2-135m"]


def test_rm_of_an_absent_model_is_an_error():
    with pytest.raises(ModelNotFoundError):
        run("rm", "smollm2-135m")
