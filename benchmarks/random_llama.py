"""Write a GGUF of a Llama's shape in llama.cpp's Q2_K mixture with random weights, for speed and memory.

python benchmarks/random_llama.py 1b FILE.gguf
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peers import UnavailableError

N_VOCAB, N_CTX = 32000, 4096
FILE_BYTES = 2_540_000_000
"""Of the 7B shape."""
WEIGHTS_PER_BLOCK = 256


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama without grouped-query attention."""

    name: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int


LLAMA2_7B = Shape("llama-2-7b", 32, 4096, 11008, 32)
LLAMA_1B = Shape("llama-1b", 16, 2048, 8192, 32)
SHAPES = {"7b": LLAMA2_7B, "1b": LLAMA_1B}


@dataclass(frozen=True)
class BlockFormat:
    """A ggml k-quant block of ``size`` bytes, with fp16 factors at byte offsets.

    ``factors`` times random quants give weights with mean 0 and standard deviation 1.
    """

    name: str
    size: int
    factors: dict[int, float]


# A Q2_K weight is d·scale·quant − dmin·min, with scale and min of 0..15 and quant of 0..3; the others have no min.
Q2_K = BlockFormat("Q2_K", 84, {80: 1 / 14, 82: 1.5 / 14})
Q3_K = BlockFormat("Q3_K", 110, {108: 1 / 43})
Q6_K = BlockFormat("Q6_K", 210, {208: 1 / 1370})


def matrices(of: Shape = LLAMA2_7B) -> Iterator[tuple[str, BlockFormat, int, int]]:
    """(name, format, n_out, n_in) of every matrix, as llama_model_quantize chooses formats for Q2_K."""
    yield "token_embd.weight", Q2_K, N_VOCAB, of.n_embd
    for layer in range(of.n_layer):
        for name, block, n_out, n_in in (
            ("attn_q", Q2_K, of.n_embd, of.n_embd),
            ("attn_k", Q2_K, of.n_embd, of.n_embd),
            ("attn_v", Q3_K, of.n_embd, of.n_embd),
            ("attn_output", Q3_K, of.n_embd, of.n_embd),
            ("ffn_gate", Q2_K, of.n_ff, of.n_embd),
            ("ffn_up", Q2_K, of.n_ff, of.n_embd),
            ("ffn_down", Q3_K, of.n_embd, of.n_ff),
        ):
            yield f"blk.{layer}.{name}.weight", block, n_out, n_in
    yield "output.weight", Q6_K, N_VOCAB, of.n_embd


def n_weights(of: Shape = LLAMA2_7B) -> int:
    return sum(n_out * n_in for _, _, n_out, n_in in matrices(of))


def norms(of: Shape = LLAMA2_7B) -> Iterator[str]:
    for layer in range(of.n_layer):
        yield f"blk.{layer}.attn_norm.weight"
        yield f"blk.{layer}.ffn_norm.weight"
    yield "output_norm.weight"


def random_blocks(rng: np.random.Generator, block: BlockFormat, n_out: int, n_in: int) -> NDArray[np.uint8]:
    """Random quants and scales [n_out, bytes of a row], with factors such that outputs are as large as inputs."""
    blocks = rng.integers(0, 256, (n_out * n_in // WEIGHTS_PER_BLOCK, block.size), dtype=np.uint8)
    for offset, factor in block.factors.items():
        blocks[:, offset : offset + 2] = np.frombuffer(np.float16(factor / math.sqrt(n_in)).tobytes(), dtype=np.uint8)
    return blocks.reshape(n_out, -1)


def write(path: Path, of: Shape = LLAMA2_7B) -> None:
    """Write the model to ``path``, one tensor at a time. Raises `UnavailableError` without the package gguf."""
    try:
        import gguf
    except ImportError as error:
        raise UnavailableError("gguf is not installed: pip install '.[bench]'") from error

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"{of.name} shape, random weights")
    writer.add_vocab_size(N_VOCAB)
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(of.n_embd)
    writer.add_block_count(of.n_layer)
    writer.add_feed_forward_length(of.n_ff)
    writer.add_head_count(of.n_head)
    writer.add_head_count_kv(of.n_head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(of.n_embd // of.n_head)
    _add_vocabulary(writer)

    for name, block, n_out, n_in in matrices(of):
        shape = (n_out, n_in // WEIGHTS_PER_BLOCK * block.size)
        kind = gguf.GGMLQuantizationType[block.name]
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=kind)
    for name in norms(of):
        writer.add_tensor_info(name, (of.n_embd,), np.dtype(np.float32), 4 * of.n_embd)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for _, block, n_out, n_in in matrices(of):
        writer.write_tensor_data(random_blocks(rng, block, n_out, n_in))
    for _ in norms(of):
        writer.write_tensor_data(np.ones(of.n_embd, dtype=np.float32))
    writer.close()


def _add_vocabulary(writer: Any) -> None:
    """Control tokens, the 256 bytes, and words that occur in no text, so that a text becomes its bytes."""
    from gguf import TokenType

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    missing = N_VOCAB - len(pieces)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces + [f"<unused{i}>" for i in range(missing)])
    writer.add_token_types(types + [TokenType.UNUSED] * missing)
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SHAPES:
        sys.exit(f"usage: random_llama.py {'|'.join(SHAPES)} FILE.gguf")
    write(Path(sys.argv[2]), SHAPES[sys.argv[1]])
