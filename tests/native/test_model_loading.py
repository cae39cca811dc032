"""Errors of `fedbpt.load_model` for files that it cannot use."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_gguf
from tiny_case import Case

import fedbpt
from fedbpt.errors import InputError, ModelError, ModelFileError, ModelNotFoundError, UnsupportedModelError


def one_line(error: BaseException) -> str:
    message = str(error)
    assert len(message.splitlines()) == 1
    return message


def test_a_missing_file_is_reported_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "no-such-model.gguf"
    with pytest.raises(ModelNotFoundError) as failed:
        fedbpt.load_model(path)
    assert "no-such-model.gguf" in one_line(failed.value)


def test_an_unknown_name_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDBPT_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFoundError) as failed:
        fedbpt.load_model("no-such-name")
    assert "no-such-name" in one_line(failed.value)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as failed:
        fedbpt.load_model(tmp_path)
    one_line(failed.value)


def test_another_kind_of_file_is_reported_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError) as failed:
        fedbpt.load_model(tiny_gguf.write_not_gguf(tmp_path / "page.gguf"))
    assert "page.gguf" in one_line(failed.value)


def test_a_path_that_is_not_utf8_works(llama: Case, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xf6del.gguf"))
    path.write_bytes(llama.path.read_bytes())
    scorer = fedbpt.load_model(path, n_threads=1)
    assert scorer.name == r"m\udcf6del"
    assert scorer.fingerprint == fedbpt.models.fingerprint(llama.path)
    assert fedbpt.models.weight_formats(path) == fedbpt.models.weight_formats(llama.path)
    assert fedbpt.models.requantize(path, "q8_0").path.is_file()
    for fails in (fedbpt.load_model, fedbpt.models.tensor_shapes):
        with pytest.raises(ModelFileError) as failed:
            fails(tiny_gguf.write_not_gguf(path))
        assert r"m\xf6del.gguf" in one_line(failed.value)


@pytest.mark.parametrize("keep", [0.0, 0.00001, 0.002, 0.02, 0.5, 0.999])
def test_a_file_cut_short_is_reported_by_its_name(llama: Case, tmp_path: Path, keep: float) -> None:
    with pytest.raises(ModelFileError) as failed:
        fedbpt.load_model(tiny_gguf.write_truncated(tmp_path / "cut.gguf", llama.path, keep))
    assert "cut.gguf" in one_line(failed.value)


@pytest.mark.parametrize("spoil", [tiny_gguf.write_wrong_version, tiny_gguf.write_lying_header])
def test_a_damaged_header_is_reported(llama: Case, tmp_path: Path, spoil: object) -> None:
    assert callable(spoil)
    with pytest.raises(ModelFileError) as failed:
        fedbpt.load_model(spoil(tmp_path / "damaged.gguf", llama.path))
    assert "damaged.gguf" in one_line(failed.value)


@pytest.mark.parametrize("tensor", ["token_embd.weight", "blk.1.attn_q.weight", "output_norm.weight"])
def test_a_file_without_one_of_its_tensors_is_damaged(tmp_path: Path, tensor: str) -> None:
    path = tiny_gguf.write(tmp_path / "holed.gguf", tiny_gguf.LLAMA, omit=tensor)
    with pytest.raises(ModelFileError) as failed:
        fedbpt.load_model(path)
    assert "holed.gguf" in one_line(failed.value)


@pytest.mark.parametrize(
    "settings", [{"n_layer": 0}, {"n_layer": 100_000}, {"n_head": 0}, {"n_head": 3}, {"n_head_kv": 0}]
)
def test_invalid_settings_do_not_end_the_process(tmp_path: Path, settings: dict[str, int]) -> None:
    """In a child process: upstream checks some settings with an assertion that aborts."""
    path = tmp_path / "senseless.gguf"
    tiny_gguf.write(path, tiny_gguf.LLAMA, claim=replace(tiny_gguf.LLAMA, **settings))
    script = f"""
import fedbpt
from fedbpt.errors import ModelFileError
try:
    fedbpt.load_model({str(path)!r})
except ModelFileError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout.startswith("refused:")


@pytest.mark.parametrize("architecture", ["gemma3n", "gemma4", "graniteswitch", "phimoe", "no-such-architecture"])
def test_an_unsupported_architecture_is_named(tmp_path: Path, architecture: str) -> None:
    path = tiny_gguf.write_other_architecture(tmp_path / "other.gguf", architecture)
    with pytest.raises(UnsupportedModelError) as failed:
        fedbpt.load_model(path)
    assert architecture in one_line(failed.value)


@pytest.mark.parametrize("n_threads", [0, -1])
def test_an_invalid_number_of_threads_is_refused(llama: Case, n_threads: int) -> None:
    with pytest.raises(InputError) as refused:
        fedbpt.load_model(llama.path, n_threads=n_threads)
    one_line(refused.value)


def test_a_failed_load_leaves_other_models_usable(llama: Case, tmp_path: Path) -> None:
    texts, embeds = llama.texts([5, 9]), llama.prompts(2, 2)
    before = llama.scorer.score_with_soft_prompt(texts, embeds)
    with pytest.raises(ModelFileError):
        fedbpt.load_model(tiny_gguf.write_truncated(tmp_path / "cut.gguf", llama.path, 0.5))
    assert (llama.scorer.score_with_soft_prompt(texts, embeds) == before).all()


def test_models_may_be_loaded_and_dropped_many_times(llama: Case) -> None:
    fedbpt.load_model(llama.path, n_threads=1)
    before = llama.scorer.memory()["rss"]
    for _ in range(30):
        scorer = fedbpt.load_model(str(llama.path), n_threads=1)
        scorer.score_with_soft_prompt(llama.texts([5]), llama.prompts(1, 1))
        del scorer
    assert llama.scorer.memory()["rss"] - before < 64 * 2**20
