"""A model file is tried in a child process before it is loaded, so that no file can end this process."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
from gguf_bytes import Gguf, read

import fedbpt
from fedbpt import models
from fedbpt.errors import ModelFileError, UnsupportedModelError
from fedbpt.models import trial
from fedbpt.models.trial import TrialReport, TrialSettings


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FEDBPT_CACHE", str(folder))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model that has not been tried."""
    return tiny_gguf.write(tmp_path / "model.gguf", tiny_gguf.SMALLEST)


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The models tried during the test, in order."""
    seen: list[Path] = []
    real = trial.run

    def run(path: Path, settings: TrialSettings) -> TrialReport:
        seen.append(path)
        return real(path, settings)

    monkeypatch.setattr(trial, "run", run)
    return seen


def edited(path: Path, edit: Callable[[Gguf], Any], source: tiny_gguf.TinyModel = tiny_gguf.SMALLEST) -> Path:
    """Write an edited ``source`` to ``path``."""
    parts = read(tiny_gguf.write(path, source).read_bytes())
    edit(parts)
    path.write_bytes(parts.write())
    return path


def half_rotated(model: Gguf) -> None:
    """llama.cpp asserts, when it builds the graph, that Qwen2 rotates whole heads."""
    model.find("qwen2.rope.dimension_count").value = 8


def bytes_for_bert(model: Gguf) -> None:
    """llama.cpp aborts, on loading, on byte tokens in BERT vocabularies."""
    model.find("tokenizer.ggml.model").value = b"bert"


def no_bytes(model: Gguf) -> None:
    """llama.cpp throws if a text holds a byte without a token."""
    model.find("tokenizer.ggml.tokens").value[258] = b"x" * 30  # of byte 255


QWEN2 = tiny_gguf.MODELS["qwen2"]


@pytest.mark.parametrize(
    ("edit", "source", "value"),
    [
        (half_rotated, QWEN2, "n_embd_head == n_rot"),  # llama.cpp's assertion
        (bytes_for_bert, tiny_gguf.SMALLEST, "llama-vocab.cpp"),
        (no_bytes, tiny_gguf.SMALLEST, "wrong.gguf"),
    ],
)
def test_a_file_that_would_end_the_process_is_refused_with_the_reason(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], edit: Callable[[Gguf], None], source: Any, value: str
) -> None:
    path = edited(tmp_path / "wrong.gguf", edit, source)
    with pytest.raises(ModelFileError) as failed:
        fedbpt.load_model(path)
    message = str(failed.value)
    assert message.splitlines() == [message]
    assert "wrong.gguf" in message
    assert value in message
    assert capfd.readouterr() == ("", "")


def test_a_refusal_keeps_its_type(tmp_path: Path) -> None:
    path = tiny_gguf.write_other_architecture(tmp_path / "other.gguf", "mamba")
    with pytest.raises(UnsupportedModelError):
        trial.run(path)


def test_a_file_that_takes_unlimited_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RWKV's tokenizer never gets past a character that only begins tokens."""
    monkeypatch.setattr(trial, "_MEMORY_BYTES", 400 << 20)
    path = edited(
        tmp_path / "endless.gguf", lambda model: setattr(model.find("tokenizer.ggml.model"), "value", b"rwkv")
    )
    with pytest.raises(ModelFileError, match=r"endless\.gguf"):
        trial.run(path)


@pytest.mark.parametrize(
    ("child", "limit"),
    [
        ("import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 30))\nwhile True: pass", None),
        ("import time; time.sleep(1000)", 0.05),
    ],
)
def test_a_child_that_does_not_end_is_ended(
    model: Path, monkeypatch: pytest.MonkeyPatch, child: str, limit: float | None
) -> None:
    monkeypatch.setattr(
        trial, "_CHILD", f"print('ready', flush=True)\nprint('stage while it spins', flush=True)\n{child}"
    )
    if limit is not None:
        monkeypatch.setattr(trial, "_WALL_PER_CPU", limit)
    with pytest.raises(ModelFileError) as failed:
        trial.run(model)
    assert "while it spins" in str(failed.value)  # the stage that the child reported


def test_a_file_is_tried_once_and_again_after_a_change(model: Path, trials: list[Path]) -> None:
    for _ in range(2):
        fedbpt.load_model(model, n_threads=1)
    assert trials == [model]

    status = model.stat()
    tiny_gguf.write(model, tiny_gguf.SMALLEST)
    os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns))
    fedbpt.load_model(model, n_threads=1)
    assert trials == [model, model]


def test_a_passed_trial_is_remembered_by_later_processes(
    model: Path, trials: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial.run_once(model, TrialSettings())
    monkeypatch.setattr(trial, "_passed", set())
    trial.run_once(model, TrialSettings())
    assert trials == [model]

    monkeypatch.setattr(trial, "_build", lambda: "a newer fedbpt")
    trial.run_once(model, TrialSettings())
    assert trials == [model, model]
    assert len(list((cache / "trials").iterdir())) == 1


def test_a_file_that_failed_is_tried_again(tmp_path: Path, trials: list[Path]) -> None:
    path = edited(tmp_path / "wrong.gguf", bytes_for_bert)
    for _ in range(2):
        with pytest.raises(ModelFileError):
            trial.run_once(path, TrialSettings())
    assert trials == [path, path]


def test_the_same_file_is_tried_again_for_other_settings(tmp_path: Path, trials: list[Path]) -> None:
    path = tiny_gguf.write(
        tmp_path / "model.gguf", tiny_gguf.MODELS["gemma3"]
    )  # heads of 32 numbers, the block size of q8_0
    trial.run_once(path, TrialSettings())
    trial.run_once(path, TrialSettings(n_threads=2))
    trial.run_once(path, TrialSettings(kv_type="q8_0"))
    assert trials == [path, path]


def test_of_many_concurrent_loads_one_runs_the_trial(model: Path, trials: list[Path]) -> None:
    asking = [threading.Thread(target=trial.run_once, args=(model, TrialSettings())) for _ in range(4)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert trials == [model]


def test_records_of_deleted_models_are_removed(model: Path, tmp_path: Path, cache: Path) -> None:
    trial.run_once(model, TrialSettings())
    model.unlink()
    trial.run_once(tiny_gguf.write(tmp_path / "next.gguf", tiny_gguf.SMALLEST), TrialSettings())
    assert len(list((cache / "trials").iterdir())) == 1


def test_a_cache_that_cannot_be_written_to_costs_a_trial_each_start(
    model: Path, trials: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDBPT_CACHE", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        trial.run_once(model, TrialSettings())
    assert trials == [model]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize("executable", ["", "/no/such/python", "/usr/bin/env", "python-that-ends", "python-that-says"])
def test_if_no_python_can_be_started_only_the_header_is_checked(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, executable: str
) -> None:
    if executable.startswith("python-"):
        program = tmp_path / executable
        program.write_text("#!/bin/sh\n" + ("exit 3\n" if executable.endswith("ends") else "echo hello\n"))
        program.chmod(0o755)
        executable = str(program)
    monkeypatch.setattr(sys, "executable", executable)
    assert fedbpt.load_model(model, n_threads=1).n_embd == tiny_gguf.SMALLEST.n_embd
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    with pytest.raises(UnsupportedModelError):
        fedbpt.load_model(tiny_gguf.write_other_architecture(tmp_path / "other.gguf", "mamba"))


def test_a_trial_process_starts_no_trials(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDBPT_IN_TRIAL", "1")
    assert not trial.run(model).tried


def test_a_late_model_is_tried_when_it_is_first_used(model: Path, trials: list[Path]) -> None:
    scorer = fedbpt.load_model(model, n_threads=1, late=True)
    assert trials == []
    scorer.tokenize("the market")
    assert trials == [model]


def test_a_file_that_fails_is_not_requantised_either(tmp_path: Path) -> None:
    path = edited(tmp_path / "wrong.gguf", bytes_for_bert)
    with pytest.raises(ModelFileError):
        models.requantize(path, "q8_0", n_threads=1)
    assert sorted(each.name for each in tmp_path.glob("*.gguf*")) == ["wrong.gguf"]


def test_a_path_of_other_bytes_than_utf8_is_tried(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/mod\xe9l.gguf"))
    tiny_gguf.write(path, tiny_gguf.SMALLEST)
    assert trial.run(path).tried
    edited(path, bytes_for_bert)
    with pytest.raises(ModelFileError) as failed:
        trial.run(path)
    str(failed.value).encode()
