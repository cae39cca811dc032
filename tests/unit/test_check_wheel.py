"""`tools/check_wheel.py` finds what does not match a wheel's tag."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import zipfile
from pathlib import Path

import check_wheel
import pytest
from check_wheel import Library, WheelError

from fedbpt import _native

SCRIPT = Path(check_wheel.__file__)
NAME = "fedbpt-0.1.0-cp311-cp311-manylinux_2_27_aarch64.whl"
MODULE = "fedbpt/_native.cpython-311-aarch64-linux-gnu.so"


def library(path: str, **changes: object) -> Library:
    """A library that keeps every promise."""
    sound = Library(
        path=path,
        machine="EM_AARCH64",
        needed=("libfedbpt-llama.so", "libc.so.6", "libm.so.6", "ld-linux-aarch64.so.1"),
        runpath="$ORIGIN",
        versions=("GLIBC_2.17", "GLIBC_2.27"),
        digest=path,
    )
    return dataclasses.replace(sound, **changes)  # type: ignore[arg-type]


SOUND = [library(MODULE), library("fedbpt/libfedbpt-llama.so"), library("fedbpt/libggml-cpu-armv8.0_1.so")]


@pytest.fixture
def wheel_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``wheel_of(libraries)``: a wheel in which reading finds ``libraries``."""

    def make(libraries: list[Library], name: str = NAME, tag: str = "cp311-cp311-manylinux_2_27_aarch64") -> Path:
        by_path = {library.path: library for library in libraries}
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("fedbpt/__init__.py", "")
            archive.writestr("fedbpt-0.1.0.dist-info/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}\n")
            for path in by_path:
                archive.writestr(path, "")
        monkeypatch.setattr(check_wheel, "read_library", lambda path, _data: by_path[path])
        return tmp_path / name

    return make


def test_a_sound_wheel_passes(wheel_of) -> None:
    check_wheel.check(wheel_of(SOUND))


@pytest.mark.parametrize(
    ("broken", "value"),
    [
        (library(MODULE, machine="EM_X86_64"), "EM_X86_64"),
        (library(MODULE, versions=("GLIBC_2.17", "GLIBC_2.34")), "GLIBC_2.34"),
        (library(MODULE, needed=("libstdc++.so.6", "libc.so.6")), r"libstdc\+\+.so.6"),
        (library(MODULE, needed=("libggml.so",)), "libggml.so"),
        (library(MODULE, needed=("libggml-cpu-armv8.0_1.so",)), "libggml-cpu-armv8.0_1.so"),
        (library(MODULE, runpath="/build/bin"), r"/build/bin.*\$ORIGIN"),
        (library(MODULE, runpath=""), r"\$ORIGIN"),
    ],
)
def test_a_library_that_does_not_match_the_tag(wheel_of, broken: Library, value: str) -> None:
    with pytest.raises(WheelError, match=value):
        check_wheel.check(wheel_of([broken, *SOUND[1:]]))


@pytest.mark.parametrize(
    ("libraries", "value"),
    [
        (SOUND[1:], MODULE[7:]),
        ([library(MODULE.replace("311", "312")), *SOUND[1:]], "_native.cpython-312"),
        (SOUND[:2], "libggml-cpu-"),
        ([*SOUND, library("fedbpt/libfedbpt-llama.so.0")], "libfedbpt-llama.so.0"),
        ([*SOUND, library("fedbpt.libs/libfedbpt-llama-0a1b2c3d.so")], "libfedbpt-llama-0a1b2c3d.so"),
        ([*SOUND, library("fedbpt/libcopy.so", digest=SOUND[1].digest)], "libcopy.so"),
    ],
)
def test_a_set_of_libraries_that_does_not_match_the_tag(wheel_of, libraries: list[Library], value: str) -> None:
    with pytest.raises(WheelError, match=value):
        check_wheel.check(wheel_of(libraries))


def test_a_wheel_that_is_too_big(wheel_of) -> None:
    wheel = wheel_of(SOUND)
    size = wheel.stat().st_size
    check_wheel.check(wheel, max_bytes=size)
    with pytest.raises(WheelError, match=f"{size}.*{size - 1}"):
        check_wheel.check(wheel, max_bytes=size - 1)


def test_a_name_that_contradicts_the_metadata(wheel_of) -> None:
    with pytest.raises(WheelError, match="linux_aarch64"):
        check_wheel.check(wheel_of(SOUND, tag="cp311-cp311-linux_aarch64"))


@pytest.mark.parametrize("name", ["fedbpt-0.1.0-py3-none-any.whl", "fedbpt-0.1.0-cp311-cp311-linux_aarch64.whl"])
def test_a_name_without_a_manylinux_tag(wheel_of, name: str) -> None:
    with pytest.raises(WheelError, match="manylinux_2_27"):
        check_wheel.check(wheel_of(SOUND, name=name))


def test_a_real_library_is_read() -> None:
    path = Path(_native.__file__)
    found = check_wheel.read_library("fedbpt/" + path.name, path.read_bytes())
    assert found.machine in check_wheel.MACHINES.values()
    assert "libc.so.6" in found.needed
    assert any(check_wheel.glibc_minor(version) > 0 for version in found.versions)
    assert found.name == path.name


@pytest.mark.parametrize("content", [b"", b"<html>404</html>"])
def test_what_is_no_wheel_gets_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / NAME], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"fedbpt: {NAME}: it cannot be read (")
