"""A model's weights are mapped from its files: a change of these is detected before a wrong result is returned."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf
from tiny_case import N_THREADS, Case

import fedbpt
from fedbpt.engine.native_scorer import NativeScorer
from fedbpt.engine.text_generator import Placed, Sampling
from fedbpt.errors import ModelFileError

TEXTS = [[5, 6, 7], [8, 9]]
LABELS = [259, 3, 411]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDBPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def path(llama: Case, tmp_path: Path) -> Path:
    """A model file that this test may change."""
    return Path(shutil.copyfile(llama.path, tmp_path / "tiny.gguf"))


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of the same size with other weights."""
    model = replace(tiny_gguf.LLAMA, seed=99)
    return tiny_gguf.write(tmp_path_factory.mktemp("other") / "other.gguf", model).read_bytes()


def load(path: Path) -> NativeScorer:
    """Load a model and compute its fingerprint, as a device does to describe itself."""
    scorer = fedbpt.load_model(path, n_threads=N_THREADS)
    assert scorer.fingerprint.startswith("sha256:")
    return scorer


def score(scorer: NativeScorer) -> np.ndarray:
    return scorer.score_with_soft_prompt(TEXTS, np.ones((1, 2, scorer.n_embd)), LABELS)


def overwrite(path: Path, content: bytes) -> None:
    """Overwrite in place, with the same inode, as `cp` and a download to the same name do."""
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()


def overwrite_keeping_times(path: Path, content: bytes) -> None:
    before = path.stat()
    overwrite(path, content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def swap(path: Path, content: bytes) -> None:
    """Replace by another file of the same name, as `mv` does."""
    beside = path.with_name("new.gguf")
    beside.write_bytes(content)
    beside.replace(path)


def cut(path: Path, content: bytes) -> None:
    overwrite(path, content[: len(content) // 3])


def empty(path: Path, _content: bytes) -> None:
    path.write_bytes(b"")


def remove(path: Path, _content: bytes) -> None:
    path.unlink()


CHANGES = [overwrite, overwrite_keeping_times, swap, cut, empty, remove]
Change = Callable[[Path, bytes], None]


@pytest.mark.parametrize("change", CHANGES)
def test_every_operation_is_refused_with_the_files_name(path: Path, other: bytes, change: Change) -> None:
    scorer = load(path)
    plan = scorer.compile(TEXTS, LABELS)
    stream = scorer.generator.open(Placed(np.array([5, 6], dtype=np.int32)), Sampling(temperature=0.0))
    stream.next()
    change(path, other)
    work: list[Callable[[], object]] = [
        lambda: score(scorer),
        lambda: plan.score(np.ones((1, 2, scorer.n_embd))),
        lambda: scorer.compile(TEXTS, LABELS),
        lambda: scorer.token_embeddings([5]),
        lambda: scorer.embedding_std,
        lambda: scorer.weight_formats,
        stream.next,
        scorer.generator.open(Placed(np.array([5], dtype=np.int32)), Sampling()).next,
    ]
    for piece in work:
        with pytest.raises(ModelFileError) as refused:
            piece()
        assert "tiny.gguf" in str(refused.value)
        assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_stays_that_of_the_loaded_file(path: Path, other: bytes, change: Change) -> None:
    scorer = load(path)
    before = scorer.fingerprint
    change(path, other)
    assert scorer.fingerprint == before


@pytest.mark.parametrize("change", CHANGES)
def test_a_fingerprint_is_never_that_of_a_later_file(path: Path, other: bytes, change: Change) -> None:
    scorer = fedbpt.load_model(path, n_threads=N_THREADS)
    change(path, other)
    with pytest.raises(ModelFileError):
        _ = scorer.fingerprint


@pytest.mark.parametrize("change", CHANGES)
def test_a_late_model_is_not_loaded_under_the_fingerprint_of_another(path: Path, other: bytes, change: Change) -> None:
    scorer = fedbpt.load_model(path, n_threads=N_THREADS, late=True)
    assert scorer.fingerprint.startswith("sha256:")
    change(path, other)
    with pytest.raises(ModelFileError):
        score(scorer)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_part_of_a_split_model_is_watched(tmp_path: Path, number: int) -> None:
    part = tiny_gguf.write_split(tmp_path, tiny_gguf.LLAMA)[number]
    scorer = load(part)
    content = bytearray(part.read_bytes())
    content[-40] ^= 0xFF
    overwrite(part, bytes(content))
    with pytest.raises(ModelFileError) as refused:
        score(scorer)
    assert part.name in str(refused.value)


def test_a_change_during_a_call_is_noticed_before_its_result_is_given(
    path: Path, other: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = load(path)
    rows, compute = np.ones((1, 2, scorer.n_embd)), scorer._engine.score

    class Engine:
        def score(self, *given: object) -> object:
            result = compute(*given)
            overwrite(path, other)
            return result

    plan = scorer.compile(TEXTS, LABELS)
    monkeypatch.setattr(scorer, "_loaded", Engine())
    monkeypatch.setattr(NativeScorer, "n_embd", rows.shape[2])
    with pytest.raises(ModelFileError):
        plan.score(rows)


@pytest.mark.parametrize(
    "touch", [Path.touch, lambda path: path.chmod(0o600), lambda path: swap(path, path.read_bytes())]
)
def test_a_file_with_the_same_content_stays_usable(path: Path, touch: Callable[[Path], None]) -> None:
    scorer = load(path)
    before = score(scorer)
    touch(path)
    assert np.array_equal(score(scorer), before)


def test_a_file_with_its_content_restored_is_usable_again(path: Path, other: bytes) -> None:
    scorer, content = load(path), path.read_bytes()
    before = score(scorer)
    overwrite(path, other)
    with pytest.raises(ModelFileError):
        score(scorer)
    overwrite(path, content)
    assert np.array_equal(score(scorer), before)


def test_a_cut_file_does_not_end_the_process(path: Path) -> None:
    """In a child process, which without the check ends in SIGBUS."""
    script = f"""
import fedbpt, numpy, os
scorer = fedbpt.load_model({str(path)!r}, n_threads=1)
os.truncate({str(path)!r}, 4096)
try:
    scorer.score_with_soft_prompt([[5, 6, 7]], numpy.ones((1, 2, scorer.n_embd)))
except fedbpt.errors.ModelFileError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout.startswith("refused:")
