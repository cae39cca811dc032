"""Tiny models, each with its scorer under test and its numpy reference, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import tiny_gguf
from numpy.typing import NDArray
from reference import Reference

import fedbpt
from fedbpt.scorer import Scorer

N_THREADS = 2  # more than one: a race between threads would show as bits that move


@dataclass(frozen=True)
class Case:
    """One tiny model: what was asked for, its file; the scorer under test and the truth where a test wants them."""

    model: tiny_gguf.TinyModel
    path: Path

    @cached_property
    def scorer(self) -> Scorer:
        """The model as fedbpt loads it."""
        return fedbpt.load_model(self.path, n_threads=N_THREADS)

    @cached_property
    def reference(self) -> Reference:
        """The same file in numpy."""
        return Reference(self.path)

    def ids(self, n: int, seed: int = 0) -> NDArray[np.int32]:
        """``n`` random token ids, control tokens left out."""
        return np.random.default_rng([seed, n]).integers(3, self.model.n_vocab, n, dtype=np.int32)

    def texts(self, lengths: list[int], seed: int = 0) -> list[NDArray[np.int32]]:
        """One random text per length."""
        return [self.ids(length, seed + index) for index, length in enumerate(lengths)]

    def prompts(self, n_candidates: int, n_prompt: int, seed: int = 0) -> NDArray[np.float32]:
        """Random soft prompts [n_candidates, n_prompt, n_embd] with the spread of token embeddings."""
        rng = np.random.default_rng([seed, n_candidates, n_prompt])
        spread = self.reference.embedding_table.std()
        return (spread * rng.standard_normal((n_candidates, n_prompt, self.model.n_embd))).astype(np.float32)


@pytest.fixture(scope="session")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """``case_of(name, weights="f32")``: the case of a model in `tiny_gguf.MODELS`, loaded once."""
    folder = tmp_path_factory.mktemp("tiny-models")
    made: dict[tuple[str, str], Case] = {}

    def get(name: str, weights: tiny_gguf.Weights = "f32") -> Case:
        if (name, weights) not in made:
            model = replace(tiny_gguf.MODELS[name], weights=weights)
            path = tiny_gguf.write(folder / f"{name}-{weights}.gguf", model)
            made[name, weights] = Case(model, path)
        return made[name, weights]

    return get


@pytest.fixture(scope="session", params=list(tiny_gguf.MODELS))
def case(request: pytest.FixtureRequest, case_of: Callable[..., Case]) -> Case:
    """Each tiny model with float32 weights."""
    return case_of(request.param)


@pytest.fixture(scope="session")
def llama(case_of: Callable[..., Case]) -> Case:
    """The llama alone, for behaviour that no architecture changes."""
    return case_of("llama")


@pytest.fixture(scope="session", params=["llama-f32", "llama-q8_0", "llama-q4_1", "gemma3-f32", "gemma3-q8_0"])
def repeatable(request: pytest.FixtureRequest, case_of: Callable[..., Case]) -> Case:
    """Models whose bits must not move: quantised weights round activations, so any change of batch shape shows."""
    name, weights = request.param.split("-")
    return case_of(name, weights)
