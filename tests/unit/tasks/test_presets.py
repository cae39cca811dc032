"""CMakePresets.json can be read by CMake, and the files that it names exist."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import cmake
import pytest

ROOT = Path(__file__).resolve().parents[3]
PRESETS = json.loads((ROOT / "CMakePresets.json").read_text())["configurePresets"]
BOARDS = {"rpi5", "pixel5-proot", "tx2"}
NAMES = {"native", "aarch64-manylinux", "x86_64-manylinux", "vulkan", "cuda", "android-arm64", *BOARDS}


def listed(**environment: str) -> set[str]:
    """The names of the presets that CMake lists."""
    command = [Path(cmake.CMAKE_BIN_DIR) / "cmake", "--list-presets"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return {line.split('"')[1] for line in done.stdout.splitlines() if '"' in line}


def test_android_is_available_with_an_ndk() -> None:
    assert listed(ANDROID_NDK="") == NAMES - {"android-arm64"}
    assert listed(ANDROID_NDK="/opt/ndk") == NAMES


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if "{sourceDir}" in preset.get("toolchainFile", "")])
def test_toolchains_are_there(preset: dict[str, str]) -> None:
    assert Path(preset["toolchainFile"].replace("${sourceDir}", str(ROOT))).is_file()


def test_every_preset_has_a_description() -> None:
    assert all(preset.get("displayName") for preset in PRESETS if not preset.get("hidden"))
