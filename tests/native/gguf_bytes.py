"""Parsing, editing and writing of GGUF files, without any check of the format's rules."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from typing import Any, TypeAlias

ARRAY, STRING = 9, 8
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""`struct` codes of GGUF's number types."""

Value: TypeAlias = Any  # a number; bytes for a string; a list of either for an array


@dataclass
class Setting:
    """A key and its value; ``item`` is the type of an array's items."""

    key: bytes
    type: int
    value: Value
    item: int = 0


@dataclass
class Tensor:
    """The header's entry for a tensor; ``offset`` is into `Gguf.data`."""

    name: bytes
    shape: list[int]
    type: int
    offset: int


@dataclass
class Gguf:
    """A parsed file: `Gguf.write` restores the bytes that `read` parsed."""

    version: int
    settings: list[Setting]
    tensors: list[Tensor]
    data: bytes
    alignment: int = 32
    counts: dict[str, int] = field(default_factory=dict)  # false counts to write, by name

    def find(self, key: str) -> Setting:
        return next(setting for setting in self.settings if setting.key == key.encode())

    def write(self) -> bytes:
        """Encode as the bytes of a file."""
        n_tensors = self.counts.get("tensors", len(self.tensors))
        n_settings = self.counts.get("settings", len(self.settings))
        out = [b"GGUF", struct.pack("<IQQ", self.version, n_tensors, n_settings)]
        for setting in self.settings:
            out += [_string(setting.key), struct.pack("<I", setting.type)]
            if setting.type == ARRAY:
                out.append(struct.pack("<IQ", setting.item, self.counts.get("items", len(setting.value))))
                out += [_packed(setting.item, each) for each in setting.value]
            else:
                out.append(_packed(setting.type, setting.value))
        for tensor in self.tensors:
            out += [_string(tensor.name), struct.pack("<I", len(tensor.shape))]
            out += [struct.pack("<Q", each & (2**64 - 1)) for each in tensor.shape]
            out.append(struct.pack("<IQ", tensor.type & (2**32 - 1), tensor.offset & (2**64 - 1)))
        header = b"".join(out)
        return header + bytes(-len(header) % self.alignment) + self.data


def read(data: bytes) -> Gguf:
    """Parse a well-formed file."""
    reader = _Reader(data)
    version, n_tensors, n_settings = reader.take("IQQ", skip=4)
    settings = []
    for _ in range(n_settings):
        key, type = reader.string(), reader.take("I")[0]
        item, count = reader.take("IQ") if type == ARRAY else (type, 1)
        values = [reader.string() if item == STRING else reader.take(CODES[item])[0] for _ in range(count)]
        settings.append(Setting(key, type, values if type == ARRAY else values[0], item))
    tensors = []
    for _ in range(n_tensors):
        name, n_dims = reader.string(), reader.take("I")[0]
        shape = list(reader.take(f"{n_dims}Q"))
        tensors.append(Tensor(name, shape, *reader.take("IQ")))
    begin = reader.at + -reader.at % 32
    return Gguf(version, settings, tensors, data[begin:])


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, codes: str, skip: int = 0) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{codes}", self.data, self.at + skip)
        self.at += skip + struct.calcsize(f"<{codes}")
        return values

    def string(self) -> bytes:
        length = self.take("Q")[0]
        self.at += length
        return self.data[self.at - length : self.at]


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _packed(type: int, value: Value) -> bytes:
    """Encode ``value`` in a type; numbers out of range wrap around."""
    if isinstance(value, bytes):
        return _string(value) if type == STRING else value[:8].ljust(8, b"\0")[: struct.calcsize(CODES.get(type, "Q"))]
    if type == STRING:
        return _string(str(value).encode())
    code = CODES.get(type, "I")
    if code in "fd":
        try:
            return struct.pack(f"<{code}", value)
        except OverflowError:
            return struct.pack(f"<{code}", float("inf"))
    size = struct.calcsize(code)
    whole = int(value) if math.isfinite(value) else 0
    return (whole & (2 ** (8 * size) - 1)).to_bytes(size, "little")
