"""`fedbpt device`: options for memory, pauses and starting at boot, with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.processes import Fleet
from tests.integration.test_cli_processes import Workshop, assert_one_line


@pytest.fixture
def workshop(tmp_path: Path, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return Workshop(tmp_path, fleet)


def test_the_service_runs_the_same_command(workshop: Workshop) -> None:
    given = [*workshop.device_arguments("a"), "--pause-on", "heat", "--max-memory", "500"]
    code, out, err = workshop.run(*given, "--install-service")
    assert code == 0, err
    printed = json.loads(out)
    assert Path(printed["path"]).name == "fedbpt-device-a.service"  # after the device's name
    text = Path(printed["path"]).read_text()
    for word in given:
        assert f'"{word}"' in text
    assert "install-service" not in text
    assert "MemoryMax=500M" in text
    assert f"WorkingDirectory={workshop.folder}" in text

    assert workshop.run(*given, "--install-service")[0] == 0
    code, _, err = workshop.run(*given, "--threads", "2", "--install-service")
    assert code == 2
    assert_one_line(err, "--force")
    assert workshop.run(*given, "--threads", "2", "--install-service", "--force")[0] == 0
    assert '"--threads" "2"' in Path(printed["path"]).read_text()


def test_a_model_that_does_not_fit_is_refused(workshop: Workshop) -> None:
    code, _, err = workshop.run(*workshop.device_arguments("a"), "--max-memory", "10")
    assert code == 2
    assert_one_line(err, "10 MiB", "--max-memory")


def test_an_unknown_trigger_is_named(workshop: Workshop) -> None:
    code, _, err = workshop.run(*workshop.device_arguments("a"), "--pause-on", "battery,moon")
    assert code == 2
    assert_one_line(err, "moon", "battery", "heat", "user")
