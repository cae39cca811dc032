"""Tiny llamas with all kinds of tokenizers; vocabularies of byte pairs that show where words were split."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import tiny_gguf

KINDS = ("spm", "bpe", "wpm", "ugm", "rwkv", "plamo2")

CHARACTERS = (
    "aAbzZ \t\n\r0123456789'sStTlLdDveVE.,!?-()[]{}|~`^$+=<>@#%&*_/\\\""
    "\u00e9\u00c9\u4e2d\uac00\u3042\u0301\u0661\u00bd\u2028\u00a0\u3000\uff01\u2018\u0645\U0001f600\x7f\x85"
)
"""Characters of all categories that pre-tokenizers distinguish."""

_NAMES = {"spm": "llama", "bpe": "gpt2", "wpm": "bert", "ugm": "t5", "rwkv": "rwkv", "plamo2": "plamo2"}
_RAW = ("gemma4", "sarvam-moe", "whitespace")  # pre-tokenizers of vocabularies that are not encoded by bytes

Entries = dict[str, tuple[int, float]]


def write(
    path: Path, kind: str, pre: str = "default", more: Entries | None = None, without: str = "", name: str = "tiny"
) -> Path:
    """A model whose tokenizer is of ``kind``, a BPE one with the pre-tokenizer ``pre``.

    ``more``: further tokens, with type and score; ``without``: characters without byte tokens; ``name``: the
    model's name.
    """
    merges: tuple[str, ...] = ()
    if kind == "bpe":
        entries, merges = _pairs(pre in _RAW)
    else:
        entries = _words(kind)
    entries |= more or {}
    for byte in without.encode():
        del entries[f"<0x{byte:02X}>"]
    smallest = replace(tiny_gguf.SMALLEST, n_vocab=len(entries))
    writer = gguf.GGUFWriter(path, smallest.architecture)
    writer.add_name(name)
    tiny_gguf._add_hyperparameters(writer, smallest)
    names = list(entries)
    writer.add_tokenizer_model(_NAMES[kind])
    writer.add_token_list(names)
    writer.add_token_types([int(token_type) for token_type, _ in entries.values()])
    writer.add_token_scores([score for _, score in entries.values()])
    if kind == "bpe":
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges(merges)
    writer.add_bos_token_id(names.index("<s>"))
    writer.add_eos_token_id(names.index("</s>"))
    writer.add_unk_token_id(names.index("<unk>"))
    writer.add_add_bos_token(False)
    for name, values in tiny_gguf.tensors(smallest).items():
        writer.add_tensor(name, values)
    tiny_gguf.close(writer)
    return path


def _special() -> Entries:
    kinds = gguf.TokenType
    return {"<unk>": (kinds.UNKNOWN, 0.0), "<s>": (kinds.CONTROL, 0.0), "</s>": (kinds.CONTROL, 0.0)}


def _pairs(raw: bool) -> tuple[Entries, tuple[str, ...]]:
    """Any two neighbours in a word merge, the first ones first: so all tokens of a word depend on where it begins."""
    normal = (gguf.TokenType.NORMAL, 0.0)
    byte_characters = tiny_gguf._byte_characters()
    entries = _special() | dict.fromkeys(byte_characters.values(), normal)
    units = [byte_characters[byte] for byte in sorted(set(CHARACTERS.encode()))]
    if raw:
        units = [character for character in CHARACTERS if character != " "]
    entries |= dict.fromkeys(units, normal)
    merges = tuple(f"{first} {second}" for first in units for second in units)
    entries |= dict.fromkeys((merge.replace(" ", "") for merge in merges), normal)
    return entries, merges


def _words(kind: str) -> Entries:
    kinds = gguf.TokenType
    entries = _special()
    if kind in ("spm", "ugm", "plamo2"):
        entries |= {f"<0x{byte:02X}>": (int(kinds.BYTE), 0.0) for byte in range(256)}
    pieces = ["\u2581", "\u2581a", "a", "aa", "aaaa", "=", "==", "good", "\u2581good"]
    if kind == "rwkv":
        pieces = [*(f"\\x{byte:02x}" for byte in range(256) if byte != ord("q")), "aa", "aaaa", "qa"]
    return entries | {piece: (int(kinds.NORMAL), -float(rank)) for rank, piece in enumerate(pieces, start=1)}
