"""The choice of Pythons in `tools/build_wheels.py`. Each build checks its wheel with `check_wheel.py`."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import build_wheels
import pytest


def write_python(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def pyenv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty pyenv folder, with nothing else on PATH."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    return tmp_path / "pyenv"


def test_a_python_on_path_comes_first(tmp_path: Path, pyenv: Path) -> None:
    found = write_python(tmp_path / "bin" / "python3.11", "echo 3.11")
    write_python(pyenv / "versions" / "3.11.7" / "bin" / "python", "echo 3.11")
    assert build_wheels.find_python("3.11") == found


@pytest.mark.parametrize("body", ["exit 127", "echo 3.12", "echo 3.11; exit 1"])
def test_one_that_does_not_run_is_another_or_has_no_headers_is_passed_over(
    tmp_path: Path, pyenv: Path, body: str
) -> None:
    write_python(tmp_path / "bin" / "python3.11", body)
    found = write_python(pyenv / "versions" / "3.11.7" / "bin" / "python", "echo 3.11")
    assert build_wheels.find_python("3.11") == found


def test_a_missing_python_is_an_error_before_anything_is_built() -> None:
    command = [sys.executable, build_wheels.__file__, "x86_64", "--pythons", "9.9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("fedbpt: ")
    assert "9.9" in line


def test_a_missing_python_of_the_default_list_is_skipped_with_a_note(
    tmp_path: Path, pyenv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_python(tmp_path / "bin" / "python3.11", "echo 3.11")
    write_python(pyenv / "versions" / "3.14.0" / "bin" / "python", "echo 3.14")
    assert build_wheels.chosen(None) == ["3.11", "3.14"]
    (line,) = capsys.readouterr().err.splitlines()
    assert all(version in line for version in ("3.10", "3.12", "3.13"))
    assert "3.14" not in line


def test_nothing_is_noted_if_all_pythons_are_here(
    tmp_path: Path, pyenv: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pyenv.parent == tmp_path
    for version in build_wheels.PYTHONS:
        write_python(tmp_path / "bin" / f"python{version}", f"echo {version}")
    assert build_wheels.chosen(None) == list(build_wheels.PYTHONS)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("pyenv")
def test_no_python_at_all_is_an_error() -> None:
    with pytest.raises(build_wheels.BuildError):
        build_wheels.chosen(None)


def test_a_requested_python_must_be_here(tmp_path: Path, pyenv: Path) -> None:
    assert pyenv.parent == tmp_path
    write_python(tmp_path / "bin" / "python3.11", "echo 3.11")
    assert build_wheels.chosen(["3.11"]) == ["3.11"]
    with pytest.raises(build_wheels.BuildError):
        build_wheels.chosen(["3.11", "3.14"])


def test_the_versions_to_build_are_those_that_the_package_promises() -> None:
    classifiers = re.findall(
        r"Programming Language :: Python :: (3\.\d+)", (build_wheels.ROOT / "pyproject.toml").read_text()
    )
    assert tuple(classifiers) == build_wheels.PYTHONS


@pytest.mark.parametrize("redirects", [False, True])
def test_headers_that_debian_keeps_elsewhere_are_found(redirects: bool, tmp_path: Path) -> None:
    include, rest = tmp_path / "include" / "python3.14", tmp_path / "include" / "x86_64-linux-gnu" / "python3.14"
    for folder in (include, rest):
        folder.mkdir(parents=True)
        (folder / "pyconfig.h").write_text("#define HERE\n")
    if redirects:
        (include / "pyconfig.h").write_text("# include <x86_64-linux-gnu/python3.14/pyconfig.h>\n")
    for _ in range(2):  # as of a second build
        found = build_wheels.headers_elsewhere(include, tmp_path / "headers")
    assert (found is not None) == redirects
    if found is not None:
        assert (found / "x86_64-linux-gnu" / "python3.14" / "pyconfig.h").read_text() == "#define HERE\n"


def test_a_wheel_that_lacks_a_module_is_refused(tmp_path: Path) -> None:
    package = tmp_path / "fedbpt"
    (package / "runs").mkdir(parents=True)
    for name in ("__init__.py", "runs/__init__.py"):
        (package / name).touch()
    wheel = tmp_path / "fedbpt.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("fedbpt/__init__.py", "")
    with pytest.raises(build_wheels.BuildError, match=r"1 .*fedbpt/runs/__init__\.py"):
        build_wheels.require_whole(wheel, package)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("fedbpt/runs/__init__.py", "")
    build_wheels.require_whole(wheel, package)
