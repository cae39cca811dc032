"""A tiny model in a test: its file, the scorer under test, the numpy reference, and random inputs for both."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tiny_gguf
from numpy.typing import NDArray
from reference import Reference

import fedbpt
from fedbpt.engine.scorer import Scorer

N_THREADS = 1  # on a busy machine, synchronising threads slows tiny models down a hundredfold


@dataclass(frozen=True)
class Case:
    """A tiny model and its file, with the scorer under test and the reference, both made on first access."""

    model: tiny_gguf.TinyModel
    path: Path

    @cached_property
    def weights(self) -> tiny_gguf.Weights:
        """Type of the file's matrices."""
        return self.model.weights

    @cached_property
    def scorer(self) -> Scorer:
        """The model as fedbpt loads it."""
        return fedbpt.load_model(self.path, n_threads=N_THREADS)

    @cached_property
    def reference(self) -> Reference:
        """The numpy reference of the same file."""
        return Reference(self.path)

    def ids(self, n: int, seed: int = 0) -> NDArray[np.int32]:
        """``n`` random token ids without control tokens."""
        return np.random.default_rng([seed, n]).integers(3, self.model.n_vocab, n, dtype=np.int32)

    def texts(self, lengths: list[int], seed: int = 0) -> list[NDArray[np.int32]]:
        """One random text per length."""
        return [self.ids(length, seed + index) for index, length in enumerate(lengths)]

    def prompts(self, n_candidates: int, n_prompt: int, seed: int = 0) -> NDArray[np.float32]:
        """Random soft prompts [n_candidates, n_prompt, n_embd] with the spread of token embeddings."""
        rng = np.random.default_rng([seed, n_candidates, n_prompt])
        spread = self.reference.embedding_table.std()
        return (spread * rng.standard_normal((n_candidates, n_prompt, self.model.n_embd))).astype(np.float32)
