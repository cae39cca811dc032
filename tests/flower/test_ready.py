"""The Flower App of the package and its configuration."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate
from flwr.common.config import flatten_dict

from fedbpt import tasks
from fedbpt.device.state import DeviceState
from fedbpt.errors import ConfigError
from fedbpt.flower import APP, ready
from tests.support.toy_scorer import ToyScorer
from tests.support.toy_task import TASK_FILE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mood.toml").write_text(TASK_FILE)
    lines = [f'{{"text": "aaa number {i}", "label": "{("negative", "positive")[i % 3 > 0]}"}}' for i in range(30)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    return tmp_path


def shipped() -> dict[str, Any]:
    config, warnings = load_and_validate(APP / "pyproject.toml")
    assert not warnings
    return flatten_dict(config["tool"]["flwr"]["app"]["config"])


def context(folder: Path, node: dict[str, Any], **changes: Any) -> Context:
    asked = {**shipped(), "task": str(folder / "mood.toml"), "data": str(folder / "train.jsonl"), **changes}
    return Context(1, 1, node, RecordDict(), asked)


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # in Flower
def test_flower_accepts_the_app_and_its_configuration_is_a_run() -> None:
    config = ready.config_of(shipped())
    settings = ready.settings_of(config, tasks.load(config.task))
    assert (config.run, settings.method, settings.rounds, settings.deadline_s) == ("flower", "pooled", 40, 600.0)
    assert settings.objective.max_text_tokens == tasks.load("ag-news").max_text_tokens
    assert len(build_fab_from_disk(APP)) < 20_000


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"modle": "x"}, "modle"),
        ({"settings.rounds": -1}, "rounds"),
        ({"settings.rounds": 0}, "rounds"),
        ({"settings.prompt.lenght": 3}, "lenght"),
        ({"devices": "two"}, "devices"),
    ],
)
def test_an_invalid_configuration_is_one_line_that_names_it(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        ready.settings_of(ready.config_of(shipped(), changes), tasks.load("ag-news"))
    assert "\n" not in str(caught.value)


def test_simulated_nodes_share_the_rows_and_a_real_one_has_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ready, "_scorer", lambda _model, _threads: ToyScorer())
    nodes = [{"partition-id": number, "num-partitions": 3} for number in range(3)]
    made = [ready.make_device(context(folder, node), DeviceState()) for node in nodes]
    assert [device.name for device in made] == ["node-0", "node-1", "node-2"]
    assert sum(device.info().n_train for device in made) == 30
    alone = ready.make_device(context(folder, {"name": "pi5", "state": "x"}), DeviceState())
    assert (alone.name, alone.info().n_train) == ("pi5", 30)


def test_a_node_without_data_names_the_option_to_set(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--node-config"):
        ready.make_device(context(folder, {}, data=""), DeviceState())


@pytest.mark.parametrize(
    ("first", "enabled", "warned"), [("fedbpt.flower", "0", False), ("flwr.supercore.telemetry", "1", True)]
)
def test_telemetry_is_off_or_warned_about(first: str, enabled: str, warned: bool) -> None:
    code = f"import {first}, fedbpt.flower, flwr.supercore.telemetry as t, os; print(t.FLWR_TELEMETRY_ENABLED)"
    given = {name: value for name, value in os.environ.items() if name != "FLWR_TELEMETRY_ENABLED"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=given)
    assert done.stdout == f"{enabled}\n"
    assert ("start Flower with FLWR_TELEMETRY_ENABLED=0" in done.stderr) is warned
