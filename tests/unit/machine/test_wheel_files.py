"""Wheels downloaded by the real pip from a local folder: pinned, verified, atomic."""

import importlib.util
import subprocess
import sys

import pytest

from fedbpt.errors import DownloadError
from fedbpt.machine import wheel_files
from fedbpt.machine.wheel_files import Package, fetch_wheel
from tests.support.raises import raises
from tests.support.toy_wheel import make_wheel


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is pip's only package source."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(wheel_files, "_POLL_S", 0.02)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_wheel_is_fetched_once_and_its_progress_ends_at_its_size(tmp_path, index):
    package = make_wheel(index, "toy-data", "toy/data.bin", b"x" * 1000)
    seen = []
    wheel = fetch_wheel(package, tmp_path / "out", lambda done, total: seen.append((done, total)))
    assert seen[-1] == (package.size, package.size)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert list((tmp_path / "out").iterdir()) == [wheel]
    next(index.iterdir()).unlink()
    assert fetch_wheel(package, tmp_path / "out") == wheel


def test_a_damaged_wheel_is_fetched_again(tmp_path, index):
    package = make_wheel(index, "toy-data", "toy/data.bin", b"x")
    wheel = fetch_wheel(package, tmp_path / "out")
    wheel.write_bytes(wheel.read_bytes()[:-1])
    fetch_wheel(package, tmp_path / "out")
    assert wheel_files.sha256_of(wheel) == package.sha256


def test_another_file_than_the_pinned_one_is_refused_and_leaves_nothing(tmp_path, index):
    make_wheel(index, "toy-data", "toy/data.bin", b"x")
    wrong = Package("toy-data", "1.0", "0" * 64, 10)
    with raises(DownloadError) as caught:
        fetch_wheel(wrong, tmp_path / "out")
    assert "toy-data==1.0" in str(caught.value)
    assert "sha256" in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.usefixtures("index")
def test_a_package_that_cannot_be_downloaded_is_named(tmp_path):
    with raises(DownloadError) as caught:
        fetch_wheel(Package("toy-data", "1.0", "0" * 64, 10), tmp_path / "out")
    assert "toy-data==1.0" in str(caught.value)


def test_a_python_without_pip_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # noqa: ARG005
    with raises(DownloadError) as caught:
        fetch_wheel(Package("toy-data", "1.0", "0" * 64, 10), tmp_path)
    assert "-m ensurepip" in str(caught.value)


def test_too_little_disk_space_is_an_error_with_the_space_needed(tmp_path):
    with raises(DownloadError) as caught:
        wheel_files.require_space(tmp_path, 10**15, "big")
    assert "big needs 1000000000 MB" in str(caught.value)
    assert 0 < caught.value.limit < 10**15


def test_a_lock_ends_with_the_process_that_held_it(tmp_path):
    script = (
        "import sys, pathlib, time\nfrom fedbpt.machine.wheel_files import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "x.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        holder.kill()
    with wheel_files.locked(tmp_path / "x.lock"):
        pass
