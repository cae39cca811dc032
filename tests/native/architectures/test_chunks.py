"""Llama 4's attention within chunks of 8,192 positions, in a model whose one layer without them has no effect.

A token sees only its own chunk, and only differences of rotary positions matter: so the end of a long text, from its
last chunk's start on, scores like a separate text.
"""

from __future__ import annotations

from dataclasses import replace

import conversion
import numpy as np
import pytest
from hugging_face import ArchitectureCase, HuggingFace
from table import ARCHITECTURES
from tiny_case import Case

from fedbpt.engine.native_generator import NativeGenerator
from fedbpt.engine.text_generator import Placed, Sampling

TOLERANCE = 0.05
N_CHUNK = 8192  # constant in llama.cpp, whatever a file says
SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 4,
    "max_position_embeddings": 2 * N_CHUNK,
}


@pytest.fixture(scope="module")
def chunked(tmp_path_factory: pytest.TempPathFactory) -> Case:
    llama4 = ARCHITECTURES["llama4"]
    architecture = replace(llama4, config={**llama4.config, **SMALL})
    reference = HuggingFace(architecture)
    reference.model.model.layers[3].self_attn.o_proj.weight.detach().zero_()
    path = tmp_path_factory.mktemp("chunks") / "llama4.gguf"
    conversion.write(path, architecture, reference.model, "f16")  # its attention computes only open cells
    return ArchitectureCase(architecture, path, reference, "f16")


def test_a_text_that_ends_in_its_second_chunk_scores_as_that_chunk(chunked: Case) -> None:
    long = chunked.ids(N_CHUNK + 50)
    ends = [N_CHUNK - 1, N_CHUNK, N_CHUNK + 1, N_CHUNK + 50]
    starts = [0, 0, N_CHUNK, N_CHUNK]
    no_prompt = np.zeros((1, 0, chunked.model.n_embd), np.float32)
    scored = chunked.scorer.score_with_soft_prompt([long[:end] for end in ends], no_prompt)[0]
    alone = chunked.scorer.score_with_soft_prompt(
        [long[start:end] for start, end in zip(starts, ends, strict=True)], no_prompt
    )[0]
    np.testing.assert_allclose(scored, alone, atol=TOLERANCE)
    expected = [chunked.reference.logits(long[N_CHUNK:end])[-1] for end in ends[2:]]
    np.testing.assert_allclose(scored[2:], expected, atol=TOLERANCE)


def test_a_prefix_in_the_first_chunk_is_intact_after_a_text_that_left_the_chunk(chunked: Case) -> None:
    """A text whose cells follow free ones shares its prefix, which none of its later tokens sees."""
    generator = NativeGenerator(chunked.scorer._engine, chunked.scorer._files)
    long = chunked.ids(N_CHUNK + 50)
    again = np.concatenate([long[:300], chunked.ids(5, seed=2)])
    small = [chunked.ids(9, seed=seed) for seed in range(5)]
    first = chunked.ids(N_CHUNK + 50, seed=1)  # the cache grows to its size, then it is dropped
    for ids in (first, *small[:3], chunked.ids(200), long, *small[3:], chunked.ids(500), again):
        stream = generator.open(Placed(ids), Sampling())
        found = stream.next(20).likeliest
    logits = chunked.reference.logits(again)[-1]
    log_p = logits - np.logaddexp.reduce(logits)
    np.testing.assert_allclose([p for _, p in found], log_p[[id_ for id_, _ in found]], atol=TOLERANCE)
