"""Run files are read and checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbpt.errors import ConfigError, TaskError
from fedbpt.runs.run_file import RunConfig, load_config
from tests.support.raises import raises
from tests.support.toy_task import TASK, TASK_FILE


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_the_shortest_run_file_names_a_task(tmp_path: Path) -> None:
    config, task = load_config(write(tmp_path, 'task = "ag-news"'))
    assert config == RunConfig(task="ag-news")
    assert task.name == "ag-news"


def test_the_documented_run_file_is_read(tmp_path: Path) -> None:
    documented = "".join(line[4:] for line in (RunConfig.__doc__ or "").split("::")[1].splitlines(keepends=True))
    config, _ = load_config(write(tmp_path, documented))
    assert config.devices == ("http://pi5:8401", "http://pixel:8401")
    assert (config.settings.rounds, config.settings.popsize, config.settings.prompt.n_prompt) == (100, 16, 1)


def test_a_task_file_is_found_next_to_the_run_file(tmp_path: Path) -> None:
    (tmp_path / "mood.toml").write_text(TASK_FILE)
    assert load_config(write(tmp_path, 'task = "mood.toml"'))[1] == TASK


def test_defaults_follow_the_run_and_the_task(tmp_path: Path) -> None:
    (tmp_path / "mood.toml").write_text("max_text_tokens = 40\n" + TASK_FILE)
    settings = load_config(write(tmp_path, 'task = "mood.toml"\n[settings]\nseed = 9'))[0].settings
    assert (settings.seed, settings.prompt.seed, settings.objective.max_text_tokens) == (9, 9, 40)


def test_explicit_values_are_kept(tmp_path: Path) -> None:
    (tmp_path / "mood.toml").write_text("max_text_tokens = 40\n" + TASK_FILE)
    text = 'task = "mood.toml"\n[settings]\nseed = 9\nprompt.seed = 0\nobjective.max_text_tokens = 128'
    settings = load_config(write(tmp_path, text))[0].settings
    assert (settings.seed, settings.prompt.seed, settings.objective.max_text_tokens) == (9, 0, 128)


def test_balance_and_restarts_are_settings_and_off_by_default(tmp_path: Path) -> None:
    plain = load_config(write(tmp_path, 'task = "ag-news"'))[0].settings
    assert (plain.balanced, plain.restarts) == (False, 0)
    text = 'task = "ag-news"\n[settings]\nbalanced = true\nevaluate_every = 5\npatience = 3\nrestarts = 2'
    settings = load_config(write(tmp_path, text))[0].settings
    assert (settings.balanced, settings.patience, settings.restarts) == (True, 3, 2)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("task =", "run.toml"),
        ("", "`task`"),
        ('task = "ag-news"\nround = 3', "'round'"),
        ('task = "ag-news"\n[settings]\npopulation = 3', "'population'"),
        ('task = "ag-news"\n[settings]\npopsize = 0', "popsize"),
        ('task = "ag-news"\nsettings = 3', "settings"),
        ('task = "ag-news"\n[settings]\nprompt = 3', "prompt"),
        ('task = "ag-news"\n[settings]\nrounds = 0', "rounds"),
        ('task = "ag-news"\n[settings]\nmethod = "magic"', "magic"),
        ('task = "ag-news"\n[settings]\nbalanced = "yes"', "balanced"),
        ('task = "ag-news"\n[settings]\nrestarts = 2', "patience"),
        ('task = "no-such"', "no-such"),
        ('task = ["ag-news"]', "task"),
    ],
)
def test_an_invalid_run_file_is_refused(tmp_path: Path, text: str, value: str) -> None:
    with raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert value in str(caught.value)


def test_a_binary_or_missing_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "binary.toml", tmp_path / "absent.toml", tmp_path):
        with raises(ConfigError, field=str(path)):
            load_config(path)


def test_an_invalid_task_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mood.toml").write_text(TASK_FILE.replace('"g"', '"b"'))
    with raises(TaskError):
        load_config(write(tmp_path, 'task = "mood.toml"'))
