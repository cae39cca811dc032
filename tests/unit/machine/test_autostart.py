"""Autostart: the files that `fedbpt device --install-service` writes."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedbpt.errors import ConfigError, FedbptError
from fedbpt.machine.autostart import boot_script, install, systemd_unit
from tests.support.raises import raises

COMMAND = [sys.executable, "-m", "fedbpt", "device", "--data", 'my "rows" 100%$HOME.jsonl']
TERMUX = {"PREFIX": "/data/data/com.termux/files/usr"}


def test_the_unit_starts_the_command_again_where_it_fails(tmp_path: Path) -> None:
    found = install(COMMAND, environment={"FEDBPT_CACHE": "/big disk"}, home=tmp_path)
    assert found.path == tmp_path / ".config/systemd/user/fedbpt-device.service"
    text = found.path.read_text()
    assert '"device" "--data" "my \\"rows\\" 100%%$$HOME.jsonl"\n' in text
    assert f"WorkingDirectory={Path.cwd()}\n" in text
    assert 'Environment="FEDBPT_CACHE=/big disk"\n' in text
    assert {"Restart=on-failure", "RestartPreventExitStatus=2"} < set(text.splitlines())
    assert "MemoryMax" not in text
    assert "enable --now fedbpt-device" in found.enable
    assert str(found.path) in found.remove


def test_a_memory_limit_is_the_units_too() -> None:
    assert "MemoryMax=900M\n" in systemd_unit(COMMAND, Path("/"), {}, 900)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not here")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    found = install(COMMAND, max_memory=900, environment={"FEDBPT_CACHE": "/big disk"}, home=tmp_path)
    verify = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(found.path)]
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_termux_gets_a_boot_script(tmp_path: Path) -> None:
    found = install(COMMAND, environment=TERMUX, home=tmp_path)
    assert found.path == tmp_path / ".termux/boot/fedbpt-device"
    assert found.path.stat().st_mode & 0o111
    assert "Termux:Boot" in found.enable


def test_the_boot_script_runs_the_command_as_it_was_given(tmp_path: Path) -> None:
    probe = [sys.executable, "-c", "import os, sys; print(os.getcwd(), sys.argv[1:], os.environ['FEDBPT_CACHE'])"]
    text = boot_script([*probe, "two words", "$HOME"], tmp_path, {"FEDBPT_CACHE": "/big disk"}, "/usr", ".my log")
    (tmp_path / "termux-wake-lock").write_text("#!/bin/sh\n")
    (tmp_path / "termux-wake-lock").chmod(0o755)
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(["/bin/sh", "-c", text], env=environment, check=True)
    assert (tmp_path / ".my log").read_text() == f"{tmp_path} ['two words', '$HOME'] /big disk\n"


def test_a_file_of_other_content_is_replaced_only_by_force(tmp_path: Path) -> None:
    found = install(COMMAND, environment={}, home=tmp_path)
    assert install(COMMAND, environment={}, home=tmp_path) == found  # the same again is no conflict
    with raises(ConfigError) as caught:
        install([*COMMAND, "--quiet"], environment={}, home=tmp_path)
    assert "--force" in str(caught.value)
    assert "--quiet" not in found.path.read_text()
    install([*COMMAND, "--quiet"], environment={}, home=tmp_path, force=True)
    assert '"--quiet"' in found.path.read_text()
    assert [path.name for path in found.path.parent.iterdir()] == [found.path.name]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / ".config").write_text("a file")
    with raises(FedbptError) as caught:
        install(COMMAND, environment={}, home=tmp_path)
    assert str(tmp_path / ".config") in str(caught.value)


@pytest.mark.parametrize("environment", [{}, TERMUX])
def test_each_named_device_on_a_machine_has_a_file_of_its_own(tmp_path: Path, environment: dict[str, str]) -> None:
    made = [
        install([*COMMAND, str(name)], device=name, environment=environment, home=tmp_path)
        for name in (None, "left", "right", "a b")
    ]
    assert [found.path.stem for found in made] == [
        "fedbpt-device",
        "fedbpt-device-left",
        "fedbpt-device-right",
        "fedbpt-device-a-b",
    ]
    for found in made[1:]:
        assert found.path.stem in f"{found.enable} {found.remove}"
        assert found.path.stem in found.notes
        assert found.path.stem in found.remove


def test_the_removal_line_is_one_word_a_path(tmp_path: Path) -> None:
    found = install(COMMAND, environment=TERMUX, home=tmp_path / "a b")
    assert shlex.split(found.remove) == ["rm", str(found.path)]
