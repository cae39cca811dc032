"""Tiny GGUF model files with seeded random weights: real architectures, a few hundred tokens, a fraction of a megabyte.

Weights are drawn so that logits spread over several units and every part (attention, feed-forward, norms,
position encoding, window) affects them: an error in any of these is far larger than rounding.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
from numpy.typing import NDArray

Weights = Literal["f32", "f16", "q8_0", "q4_1"]

TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_1": gguf.GGMLQuantizationType.Q4_1,
}
_WORDS = (
    *("the", "of", "and", "to", "in", "a", "is", "was", "it", "good", "bad", "great", "terrible", "movie", "film"),
    *("market", "stock", "game", "team", "science", "computer", "world", "news", "topic", "text", "answer"),
    *("business", "sports"),
)


@dataclass(frozen=True)
class TinyModel:
    """Settings of a model. Widths are multiples of 32, so that all weight formats are possible."""

    architecture: Literal["llama", "qwen2", "gemma3"]
    tokenizer: Literal["spm", "bpe"]
    pre: str = "default"  # the pre-tokenizer of a BPE vocabulary
    add_bos: bool = True
    n_vocab: int = 416
    n_layer: int = 3
    n_embd: int = 64
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 16
    n_ff: int = 96
    n_ctx: int = 512
    rms_eps: float = 1e-5
    rope_base: float = 10_000.0
    sliding_window: int = 0
    tied: bool = False
    output_bias: bool = False
    weights: Weights = "f32"
    seed: int = 1


LLAMA = TinyModel("llama", "spm")
LLAMA_BPE = TinyModel("llama", "bpe", pre="smollm", add_bos=False, rope_base=100_000.0, tied=True, seed=2)
QWEN2 = TinyModel("qwen2", "bpe", pre="qwen2", add_bos=False, rms_eps=1e-6, rope_base=1_000_000.0, seed=3)
# n_embd is not a square, so that a missing or doubled embedding scale is not a power of two; heads are wider than
# n_embd / n_head, as in the real models; one of the seven layers (the sixth) has global attention.
GEMMA3 = TinyModel(
    "gemma3",
    "spm",
    n_layer=7,
    n_embd=96,
    head_dim=32,
    n_ff=128,
    rms_eps=1e-6,
    rope_base=1_000_000.0,
    sliding_window=24,
    tied=True,
    seed=4,
)
# for tests with thousands of calls; not in MODELS, as it is too small for meaningful logits
SMALLEST = replace(LLAMA, n_layer=1, n_embd=32, n_head=2, n_head_kv=1, n_ff=32)
MODELS = {"llama": LLAMA, "llama-bpe": LLAMA_BPE, "qwen2": QWEN2, "gemma3": GEMMA3}


@dataclass(frozen=True)
class Vocabulary:
    """Token texts as the file stores them, with llama.cpp's token types, scores (SPM) and merges (BPE)."""

    kind: Literal["spm", "bpe"]
    pieces: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    bos: int
    eos: int

    def text(self, ids: NDArray[np.int32]) -> str:
        """The text of ``ids`` without control tokens; an SPM text keeps the blank that its tokenizer adds in front."""
        data = b"".join(self._bytes(int(token)) for token in ids)
        return data.decode("utf-8")

    def _bytes(self, token: int) -> bytes:
        piece, kind = self.pieces[token], self.types[token]
        if kind == gguf.TokenType.CONTROL:
            return b""
        if kind == gguf.TokenType.BYTE:
            return bytes([int(piece[3:-1], 16)])
        if self.kind == "spm":
            return piece.replace("\u2581", " ").encode("utf-8")
        byte_of = {char: byte for byte, char in _byte_characters().items()}
        return bytes(byte_of[char] for char in piece)


def vocabulary(model: TinyModel) -> Vocabulary:
    """The vocabulary that `write` gives ``model``."""
    return _spm(model.n_vocab) if model.tokenizer == "spm" else _bpe(model.n_vocab)


def _spm(n_vocab: int) -> Vocabulary:
    kinds = gguf.TokenType
    entries: dict[str, tuple[int, float]] = {"<unk>": (kinds.UNKNOWN, 0.0)}
    entries["<s>"] = entries["</s>"] = (kinds.CONTROL, 0.0)
    entries.update({f"<0x{byte:02X}>": (kinds.BYTE, 0.0) for byte in range(256)})
    pieces = [prefix for word in _WORDS for prefix in _prefixes("\u2581" + word)]
    pieces += ["\u2581", *"abcdefghijklmnopqrstuvwxyz.,:!?'0123456789"]
    for rank, piece in enumerate(dict.fromkeys(pieces)):
        entries[piece] = (kinds.NORMAL, -float(rank + 1))
    return _padded("spm", entries, (), n_vocab, bos="<s>", eos="</s>")


def _bpe(n_vocab: int) -> Vocabulary:
    kinds = gguf.TokenType
    control = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    entries: dict[str, tuple[int, float]] = dict.fromkeys(control, (kinds.CONTROL, 0.0))
    entries.update(dict.fromkeys(_byte_characters().values(), (kinds.NORMAL, 0.0)))
    merges: dict[str, None] = {}
    for word in _WORDS:
        for piece in _prefixes("\u0120" + word):
            entries.setdefault(piece, (kinds.NORMAL, 0.0))
            merges[f"{piece[:-1]} {piece[-1]}"] = None
    return _padded("bpe", entries, tuple(merges), n_vocab, bos="<|im_start|>", eos="<|im_end|>")


def _prefixes(piece: str) -> list[str]:
    return [piece[:length] for length in range(2, len(piece) + 1)]


def _padded(
    kind: Literal["spm", "bpe"],
    entries: dict[str, tuple[int, float]],
    merges: tuple[str, ...],
    n_vocab: int,
    bos: str,
    eos: str,
) -> Vocabulary:
    missing = n_vocab - len(entries)
    if missing < 0:
        raise ValueError(f"n_vocab must be at least {len(entries)}")
    entries |= {f"<unused{index}>": (gguf.TokenType.UNUSED, -1e6) for index in range(missing)}
    names = tuple(entries)
    types = tuple(int(kind_) for kind_, _ in entries.values())
    scores = tuple(score for _, score in entries.values())
    return Vocabulary(kind, names, types, scores, merges, names.index(bos), names.index(eos))


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable character for each byte: printable Latin-1 maps to itself, other bytes to 256 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in printable}
    for shift, byte in enumerate(byte for byte in range(256) if byte not in table):
        table[byte] = chr(256 + shift)
    return table


def tensors(model: TinyModel) -> dict[str, NDArray[np.float32]]:
    """The float32 weights by GGUF tensor name, matrices as [n_out, n_in]."""
    rng = np.random.default_rng(model.seed)

    def matrix(n_out: int, n_in: int, gain: float) -> NDArray[np.float32]:
        return (rng.standard_normal((n_out, n_in)) * gain / np.sqrt(n_in)).astype(np.float32)

    def norm(width: int, mean: float = 1.0) -> NDArray[np.float32]:
        # Gemma's norms multiply by 1 + w; converters store the sum, so a GGUF norm is around 1 for all.
        return (mean * (1 + 0.25 * rng.standard_normal(width))).astype(np.float32)

    q_width, kv_width = model.n_head * model.head_dim, model.n_head_kv * model.head_dim
    logit_spread = 3.0
    result = {"token_embd.weight": matrix(model.n_vocab, model.n_embd, logit_spread if model.tied else 8.0)}
    for layer in range(model.n_layer):
        block = {
            "attn_norm.weight": norm(model.n_embd),
            "attn_q.weight": matrix(q_width, model.n_embd, 1.3),
            "attn_k.weight": matrix(kv_width, model.n_embd, 1.3),
            "attn_v.weight": matrix(kv_width, model.n_embd, 1.5),
            "attn_output.weight": matrix(model.n_embd, q_width, 1.5),
            "ffn_norm.weight": norm(model.n_embd),
            "ffn_gate.weight": matrix(model.n_ff, model.n_embd, 1.5),
            "ffn_up.weight": matrix(model.n_ff, model.n_embd, 1.5),
            "ffn_down.weight": matrix(model.n_embd, model.n_ff, 1.0),
        }
        if model.architecture == "qwen2":
            for name, width in (("q", q_width), ("k", kv_width), ("v", kv_width)):
                block[f"attn_{name}.bias"] = (0.5 * rng.standard_normal(width)).astype(np.float32)
        if model.architecture == "gemma3":
            block["attn_q_norm.weight"] = norm(model.head_dim, 1.2)
            block["attn_k_norm.weight"] = norm(model.head_dim, 1.2)
            block["post_attention_norm.weight"] = norm(model.n_embd)
            # Small, since ggml's CPU backend looks GELU up in a table of half-precision values, whose rounding error
            # must stay well under the tests' tolerance.
            block["post_ffw_norm.weight"] = norm(model.n_embd, 0.1)
        result |= {f"blk.{layer}.{name}": values for name, values in block.items()}
    result["output_norm.weight"] = norm(model.n_embd)
    if not model.tied:
        result["output.weight"] = matrix(model.n_vocab, model.n_embd, logit_spread)
    if model.output_bias:
        result["output.bias"] = rng.standard_normal(model.n_vocab).astype(np.float32)
    return result


def write(
    path: Path,
    model: TinyModel,
    omit: str | None = None,
    claim: TinyModel | None = None,
    tensors_per_file: int = 0,
) -> Path:
    """Write ``model`` to ``path`` and return it.

    For damaged files: ``omit`` names a tensor to leave out; ``claim`` is a model whose settings to write instead.
    ``tensors_per_file``: see `write_split`.
    """
    writer = gguf.GGUFWriter(path, model.architecture, split_max_tensors=tensors_per_file)
    writer.add_name(f"tiny-{model.architecture}")
    _add_hyperparameters(writer, claim or model)
    add_tokenizer(writer, model)
    for name, values in tensors(model).items():
        if name == omit:
            continue
        # llama.cpp keeps norms and biases in float32 whatever the type of the matrices.
        kind = TYPES[model.weights] if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    close(writer)
    return path


def write_split(folder: Path, model: TinyModel, n_parts: int = 3, name: str = "tiny") -> list[Path]:
    """Write ``model`` in ``n_parts`` files as llama.cpp's converter does; their paths in order."""
    write(folder / f"{name}.gguf", model, tensors_per_file=-(-len(tensors(model)) // n_parts))
    return [folder / f"{name}-{i + 1:05d}-of-{n_parts:05d}.gguf" for i in range(n_parts)]


def close(writer: gguf.GGUFWriter) -> None:
    """Write the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_hyperparameters(writer: gguf.GGUFWriter, model: TinyModel) -> None:
    writer.add_vocab_size(model.n_vocab)
    writer.add_context_length(model.n_ctx)
    writer.add_embedding_length(model.n_embd)
    writer.add_block_count(model.n_layer)
    writer.add_feed_forward_length(model.n_ff)
    writer.add_head_count(model.n_head)
    writer.add_head_count_kv(model.n_head_kv)
    writer.add_layer_norm_rms_eps(model.rms_eps)
    writer.add_rope_freq_base(model.rope_base)
    writer.add_rope_dimension_count(model.head_dim)
    if model.head_dim * model.n_head != model.n_embd:
        writer.add_key_length(model.head_dim)
        writer.add_value_length(model.head_dim)
    if model.sliding_window:
        writer.add_sliding_window(model.sliding_window)


def add_tokenizer(writer: gguf.GGUFWriter, model: TinyModel) -> None:
    """Add the `vocabulary` of ``model``."""
    vocab = vocabulary(model)
    writer.add_tokenizer_model("llama" if vocab.kind == "spm" else "gpt2")
    writer.add_token_list(vocab.pieces)
    writer.add_token_types(vocab.types)
    if vocab.kind == "spm":
        writer.add_token_scores(vocab.scores)
        writer.add_add_space_prefix(model.architecture != "gemma3")
    else:
        if model.pre:
            writer.add_tokenizer_pre(model.pre)
        writer.add_token_merges(vocab.merges)
    writer.add_bos_token_id(vocab.bos)
    writer.add_eos_token_id(vocab.eos)
    writer.add_add_bos_token(model.add_bos)


# --- invalid files ------------------------------------------------------------------------------------------------


def write_truncated(path: Path, source: Path, keep: float) -> Path:
    """Write the first ``keep`` (a fraction) of ``source``'s bytes."""
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def write_not_gguf(path: Path) -> Path:
    """Write a text file under a model's name."""
    path.write_text("This is a web page that says 404.\n" * 100)
    return path


def write_wrong_version(path: Path, source: Path) -> Path:
    """Write ``source`` with a format version that does not exist."""
    shutil.copyfile(source, path)
    with path.open("r+b") as file:
        file.seek(4)
        file.write((9999).to_bytes(4, "little"))
    return path


def write_lying_header(path: Path, source: Path) -> Path:
    """Write ``source`` with a header that claims 2^60 key-value pairs."""
    shutil.copyfile(source, path)
    with path.open("r+b") as file:
        file.seek(16)
        file.write((1 << 60).to_bytes(8, "little"))
    return path


def write_other_architecture(path: Path, architecture: str) -> Path:
    """Write a well-formed GGUF file of ``architecture`` with a llama's tensors and generic settings."""
    model = replace(LLAMA, architecture=architecture)  # type: ignore[arg-type]
    return write(path, model)
