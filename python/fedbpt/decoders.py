"""Decoding into message types: MessagePack, JSON, and what another parser has read.

msgspec keeps what it knows of a struct on the class, from the first use on. While one thread collects it, another one
that decodes the same class would read a part of it, and crash. So it is collected for one type at a time, here.
"""

from __future__ import annotations

import difflib
import os
import re
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

_collecting = threading.RLock()


def _after_fork() -> None:
    global _collecting
    _collecting = threading.RLock()  # another thread of the parent may hold it


os.register_at_fork(after_in_child=_after_fork)


@cache
def _collected(kind: Any) -> tuple[msgspec.msgpack.Decoder[Any], msgspec.json.Decoder[Any]]:
    with _collecting:
        return msgspec.msgpack.Decoder(kind), msgspec.json.Decoder(kind)


def _decoders(kind: Any) -> tuple[msgspec.msgpack.Decoder[Any], msgspec.json.Decoder[Any]]:
    return _collected(kind)  # typed: mypy takes no class for hashable


def from_msgpack(body: bytes, kind: type[T]) -> T:
    """Decode MessagePack as ``kind``. Raises `fedbpt.checking.DECODE_ERRORS`, as the other functions do."""
    found: T = _decoders(kind)[0].decode(body)
    return found


def from_json(text: bytes | str, kind: type[T]) -> T:
    """Decode JSON as ``kind``."""
    found: T = _decoders(kind)[1].decode(text)
    return found


def from_builtins(value: Any, kind: type[T]) -> T:
    """Make a ``kind`` of lists, dicts, strings and numbers."""
    _decoders(kind)
    return msgspec.convert(value, kind)


_UNKNOWN = re.compile(r"unknown field `(?P<name>[^`]*)`(?: - at `\$\.?(?P<path>[^`]*)`)?")
_ENUM = re.compile(r"[Ii]nvalid enum value (?P<value>'[^']*'|\S+)(?: - at `\$\.?(?P<path>[^`]*)`)?")


def explain(error: msgspec.ValidationError, kind: Any) -> str:
    """What is wrong with a file of ``kind``, in words of the file: the nearest key, or the values that are allowed."""
    said = str(error)
    if found := _UNKNOWN.search(said):
        name, path = found["name"], found["path"] or ""
        where = f" in [{path}]" if path else ""
        places = [place for place, key in _keys(kind) if key == name and place != path]
        if places:
            return f"{name!r} does not belong{where or ' at the top'}: move it to {_section(places[0])}"
        near = difflib.get_close_matches(name, {key for _, key in _keys(kind)}, 1, 0.7)
        if near:
            place = next(place for place, key in _keys(kind) if key == near[0])
            return f"there is no {name!r}{where}: did you mean {near[0]!r} in {_section(place)}?"
        return f"there is no {name!r}{where}: remove it"
    if found := _ENUM.search(said):
        known = ", ".join(map(str, _choices(kind, (found["path"] or "").split("."))))
        if known:
            return f"{found['path']} = {found['value']} is not known: use one of {known}"
    return said


def _section(path: str) -> str:
    return f"[{path}]" if path else "the top of the file"


def _keys(kind: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """(section, key) of a struct and of the structs in it."""
    for info in _structs(msgspec.inspect.type_info(kind) if depth == 0 else kind):
        for field in info.fields:
            yield path, field.encode_name
            if depth < 3:
                yield from _keys(field.type, f"{path}.{field.encode_name}".lstrip("."), depth + 1)


def _structs(info: Any) -> Iterator[msgspec.inspect.StructType]:
    if isinstance(info, msgspec.inspect.StructType):
        yield info
    elif isinstance(info, msgspec.inspect.UnionType):
        for each in info.types:
            yield from _structs(each)
    elif hasattr(info, "item_type"):
        yield from _structs(info.item_type)


def _choices(kind: Any, path: list[str]) -> list[Any]:
    """The values that the field at ``path`` allows; none if they are not listed."""
    infos = [msgspec.inspect.type_info(kind)]
    for name in path:
        infos = [
            field.type
            for info in infos
            for each in _structs(info)
            for field in each.fields
            if field.encode_name == name
        ]
    flat = [each for info in infos for each in (info.types if isinstance(info, msgspec.inspect.UnionType) else (info,))]
    return [value for each in flat if isinstance(each, msgspec.inspect.LiteralType) for value in each.values]
