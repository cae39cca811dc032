"""Properties of a loaded model, and its token embeddings."""

from __future__ import annotations

import hashlib
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from tiny_case import Case

import fedbpt
from fedbpt.engine.scorer import Scorer
from fedbpt.errors import ModelWarning


def test_a_loaded_model_is_a_scorer(case: Case) -> None:
    assert isinstance(case.scorer, Scorer)


def test_the_sizes_are_the_files(case: Case) -> None:
    assert case.scorer.n_embd == case.model.n_embd
    assert case.scorer.n_vocab == case.model.n_vocab
    assert case.scorer.architecture == case.model.architecture


def test_names_are_for_people(case: Case) -> None:
    assert case.scorer.name.strip()
    assert case.scorer.backend.strip()


def test_the_fingerprint_is_the_files_sha256(case: Case) -> None:
    assert case.scorer.fingerprint == "sha256:" + hashlib.sha256(case.path.read_bytes()).hexdigest()


def test_a_path_may_be_a_string(llama: Case) -> None:
    assert fedbpt.load_model(str(llama.path)).fingerprint == llama.scorer.fingerprint


def test_token_embeddings_are_what_the_first_layer_sees(case: Case) -> None:
    every = case.scorer.token_embeddings(np.arange(case.model.n_vocab))
    assert every.dtype == np.float32
    np.testing.assert_allclose(every, case.reference.embedding_table, rtol=1e-6, atol=0)


def test_token_embeddings_follow_the_ids(case: Case) -> None:
    ids = [7, 300, 7, 0, case.model.n_vocab - 1]
    table = case.scorer.token_embeddings(np.arange(case.model.n_vocab))
    np.testing.assert_array_equal(case.scorer.token_embeddings(ids), table[ids])
    assert case.scorer.token_embeddings([]).shape == (0, case.model.n_embd)


def test_quantised_token_embeddings_are_dequantised(repeatable: Case) -> None:
    every = repeatable.scorer.token_embeddings(np.arange(repeatable.model.n_vocab))
    np.testing.assert_allclose(every, repeatable.reference.embedding_table, rtol=1e-5, atol=1e-6)


def test_the_embedding_scale_is_between_the_table_and_the_first_layer(case: Case) -> None:
    expected = np.sqrt(case.model.n_embd) if case.model.architecture == "gemma3" else 1.0
    assert case.scorer.embedding_scale == pytest.approx(expected, rel=1e-6)  # type: ignore[attr-defined]


def test_models_computed_like_their_reference_have_no_notes(case: Case) -> None:
    assert case.scorer.notes == ()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ({"sliding_window": 64}, "64"),
        ({"tokenizer": "bpe", "pre": ""}, "tokenizer.ggml.pre"),
        ({"sliding_window": 512}, ""),
    ],
    ids=["window", "pre-tokenizer", "window-of-the-whole-context"],
)
def test_a_difference_of_llama_cpp_is_warned_of_once(tmp_path: Path, change: dict[str, Any], value: str) -> None:
    path = tiny_gguf.write(tmp_path / "model.gguf", replace(tiny_gguf.LLAMA, **change))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scorer = fedbpt.load_model(path, n_threads=1)
    assert [type(each.message) for each in caught] == [ModelWarning] * bool(value)
    assert len(scorer.notes) == bool(value)
    assert all(value in note for note in scorer.notes)


def test_embedding_std_is_that_of_the_scaled_table(case: Case) -> None:
    assert case.scorer.embedding_std == pytest.approx(float(case.reference.embedding_table.std()), rel=1e-4)


def test_memory_is_reported_by_part(case: Case) -> None:
    case.scorer.score_with_soft_prompt(case.texts([20, 30]), case.prompts(2, 3))
    memory = case.scorer.memory()
    assert {"weights", "kv", "compute", "rss", "peak_rss"} <= set(memory)
    assert all(isinstance(size, int) for size in memory.values())
    file_size = case.path.stat().st_size
    assert 0.5 * file_size < memory["weights"] < 2 * file_size
    token_bytes = case.model.n_layer * case.model.n_head_kv * case.model.head_dim * 2 * 2
    assert memory["kv"] >= 50 * token_bytes
    assert 0 < memory["compute"] < 2**30
    assert memory["weights"] < memory["rss"] <= memory["peak_rss"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process its size there")
def test_rss_matches_the_system(llama: Case) -> None:
    memory = llama.scorer.memory()
    status = Path("/proc/self/status").read_text()
    for part, line in (("rss", "VmRSS"), ("peak_rss", "VmHWM")):
        told = re.search(rf"{line}:\s+(\d+) kB", status)
        assert told is not None
        assert memory[part] == pytest.approx(int(told[1]) * 1024, rel=0.1)
