"""Sizes of a model by its GGUF header."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from fedbpt.models.headers import Sizes, sizes_of


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(*pairs: tuple[str, int, bytes], version: int = 3) -> bytes:
    body = b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in pairs)
    return struct.pack("<4sIQQ", b"GGUF", version, 0, len(pairs)) + body


BLOCKS = ("llama.block_count", 4, struct.pack("<I", 30))
WIDTH = ("llama.embedding_length", 4, struct.pack("<I", 576))
BEFORE = (
    ("general.architecture", 8, text("llama")),
    ("general.tags", 9, struct.pack("<IQ", 8, 2) + text("a") + text("b")),
    ("general.ratio", 6, struct.pack("<f", 0.5)),
)


def test_both_sizes_are_read_after_other_keys(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(header(*BEFORE, WIDTH, BLOCKS))
    assert sizes_of(path) == Sizes(30, 576)


def test_layers_that_predict_further_tokens_are_not_counted(tmp_path: Path) -> None:
    """As llama.cpp counts: a device that has not loaded its model yet must name the same number."""
    path = tmp_path / "model.gguf"
    more = ("llama.nextn_predict_layers", 4, struct.pack("<I", 1))
    vocabulary = ("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 2**40))  # not read
    path.write_bytes(header(*BEFORE, BLOCKS, WIDTH, more, vocabulary))
    assert sizes_of(path) == Sizes(29, 576)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        header(*BEFORE),
        header(*BEFORE, BLOCKS)[:-2],
        b"GGML" + header(BLOCKS, WIDTH)[4:],
        header(("general.tags", 9, struct.pack("<IQ", 8, 2**40)), BLOCKS, WIDTH),
        header(("general.name", 8, struct.pack("<Q", 2**40)), BLOCKS, WIDTH),
        header(("general.name", 99, b""), BLOCKS, WIDTH),
    ],
    ids=["empty", "cut", "no sizes", "cut in a value", "another magic", "a huge array", "a huge string", "a new type"],
)
def test_a_header_without_them_tells_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    found = sizes_of(path)
    assert 0 in found


def test_a_missing_file_tells_nothing(tmp_path: Path) -> None:
    assert sizes_of(tmp_path / "none.gguf") == Sizes(0, 0)
