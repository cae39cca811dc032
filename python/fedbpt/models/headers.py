"""Sizes of a model from its GGUF header, without the native module: a device describes its model before it loads it."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

_FORMATS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST = 2**20  # elements of an array that precedes the sizes, or bytes of a string: writers put both after them


class Sizes(NamedTuple):
    """``n_layer``, ``n_embd``: 0 where the header does not tell them; loading the model then says what is wrong."""

    n_layer: int
    n_embd: int


def sizes_of(path: Path) -> Sizes:
    """The sizes of the model whose first, or only, file is ``path``."""
    found: dict[str, int] = {}
    try:
        with path.open("rb") as file:
            magic, version, _, n_keys = struct.unpack("<4sIQQ", file.read(24))
            for _ in range(n_keys if magic == b"GGUF" and version >= 2 else 0):
                key = _string(file)
                if key.startswith("tokenizer.") and {"block_count", "embedding_length"} <= found.keys():
                    break  # writers put all sizes before the vocabulary
                value = _value(file, *struct.unpack("<I", file.read(4)))
                if isinstance(value, int):
                    found[key.partition(".")[2]] = value
    except (OSError, struct.error, UnicodeDecodeError, ValueError):
        return Sizes(0, 0)
    n_layer = found.get("block_count", 0) - found.get("nextn_predict_layers", 0)  # which the scorer does not run
    return Sizes(max(n_layer, 0), found.get("embedding_length", 0))


def _string(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _MOST:
        raise ValueError(f"a string of {length} bytes in the header")
    return file.read(length).decode()


def _value(file: BinaryIO, kind: int) -> object:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        of, length = struct.unpack("<IQ", file.read(12))
        if length > _MOST:
            raise ValueError(f"an array of {length} elements in the header")
        for _ in range(length):
            _value(file, of)
        return None
    if kind not in _FORMATS:
        raise ValueError(f"a value of type {kind} in the header")
    layout = f"<{_FORMATS[kind]}"
    return struct.unpack(layout, file.read(struct.calcsize(layout)))[0]
