"""What a caller gives, checked against the annotations: of a function's arguments (`checked`), of a struct's or a
dataclass's fields (`check_fields`).

A value of another kind is an error of ours that names the argument, what is wanted and what was given; numbers of numpy
become Python's. Kinds that are not known here, arrays for one, are taken as they are: who uses them checks them.
"""

from __future__ import annotations

import collections.abc
import inspect
import math
import numbers
import operator
import os
import re
import types
from collections.abc import Callable
from functools import cache, partial, wraps
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any, Final, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedbpt.checking import half_character
from fedbpt.errors import ConfigError, InputError
from fedbpt.quantities import LARGEST

P = ParamSpec("P")
R = TypeVar("R")

MOST_SHOWN: Final = 40
"""Characters of a string that an error shows; a longer one may be a row."""

_MODELS: Final = ("Scorer", "BenchScorer", "TextModel", "Tokenizer", "Model")
_WORDS: Final = {
    **dict.fromkeys(_MODELS, "a model, as fedbpt.load_model(NAME) gives it"),
    **dict.fromkeys(("Path", "PathLike"), "a path that a file may have"),
    "Prompt": "a prompt, as Prompt.load(FILE) or tune(...).prompt gives it",
    "Task": "a task, as fedbpt.tasks.load(NAME) gives it",
}
"""What a caller knows some classes as."""

_ABSENT: Final = object()
_COLLECTIONS: Final = (
    tuple, list, collections.abc.Sequence, collections.abc.Collection, collections.abc.Iterable
)  # fmt: skip
_ARRAYS: Final = set(get_args(ArrayLike)) - {bool, int, float, complex, str, bytes}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, for callers that may be wrong: its arguments fit their annotations, or it raises `InputError`.

    It has no ``*args`` and no ``**kwargs``.
    """
    signature, where = inspect.signature(function), function.__qualname__.removesuffix(".__init__")
    parameters = signature.parameters.values()
    positional = [each.name for each in parameters if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    required = {each.name for each in parameters if each.default is inspect.Parameter.empty}
    call: Callable[..., R] = function

    @wraps(function)
    def with_fitting_arguments(*args: P.args, **kwargs: P.kwargs) -> R:
        given = {**dict(zip(positional, args, strict=False)), **kwargs}
        if len(given) < len(args) + len(kwargs) or not required <= given.keys() <= signature.parameters.keys():
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise InputError(f"{where}: {error}") from error
        kinds = _kinds_of(function)
        for name, value in given.items():
            if name in kinds:
                given[name] = _fitting(value, kinds[name], where, name, InputError)
        return call(**given)

    return with_fitting_arguments


def check_fields(made: Any) -> None:
    """For ``__post_init__`` of a frozen struct or dataclass: raises `ConfigError` for a field that does not fit."""
    made_of: Any = type(made)
    put = msgspec.structs.force_setattr if isinstance(made, msgspec.Struct) else object.__setattr__
    for name, kind in _kinds_of(made_of).items():
        value = getattr(made, name)
        fitting = _fitting(value, kind, made_of.__name__, name, ConfigError)
        if fitting is not value:
            put(made, name, fitting)


class _NamedFields:
    """Of a class: what its fields are not called is an error of ours, too."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc] # a metaclass's
        except TypeError as error:
            fields = ", ".join(_kinds_of(self))
            raise ConfigError(f"{self.__name__}: {error}; its fields are {fields}") from error


class StructMeta(_NamedFields, msgspec.StructMeta):
    """The metaclass of structs that call `check_fields`."""


class DataclassMeta(_NamedFields, type):
    """The metaclass of dataclasses that call `check_fields`."""


@cache
def _kinds_of(annotated: Any) -> dict[str, Any]:
    hints = get_type_hints(annotated, include_extras=True)
    return {name: kind for name, kind in hints.items() if name != "return"}


def as_array(given: Any, name: str) -> NDArray[Any]:
    """The argument ``name`` as an array. Raises `InputError` for what is none: lists of several lengths, say."""
    try:
        return np.asarray(given)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{name} must be an array, its rows of one length") from error


def array_of(given: Any, dtype: type[np.floating[Any]] | type[np.integer[Any]], name: str) -> NDArray[Any]:
    """A new array of ``dtype`` of the argument ``name``; what is too large for floats of it becomes infinity.

    Raises `InputError` for what are no such numbers.
    """
    wanted = f"{name} must be an array of {'whole numbers' if issubclass(dtype, np.integer) else 'numbers'}"
    found = as_array(given, name)
    if found.size and found.dtype.kind not in ("iu" if issubclass(dtype, np.integer) else "fiu"):
        raise InputError(f"{wanted}, got {found.dtype}")
    if issubclass(dtype, np.integer) and found.size:
        least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
        if int(found.min()) < least or int(found.max()) > most:
            raise InputError(f"{wanted} from {least} to {most}")
    with np.errstate(over="ignore"):
        return np.array(found, dtype=dtype)


class _MisfitError(Exception):
    """``given``: in words, what does not fit."""

    def __init__(self, given: str, public: str) -> None:
        super().__init__(given)
        self.given, self.public = given, public


def _fitting(value: Any, kind: Any, where: str, name: str, refusal: type[InputError]) -> Any:
    try:
        return _conversion(kind)(value)
    except _MisfitError as misfit:
        wanted = f"{where}: {name} must be {_described(kind)}, got"
        raise refusal(f"{wanted} {misfit.given}", public=f"{wanted} {misfit.public}") from None


def _misfit(value: Any, *, inner: bool = False) -> _MisfitError:
    """``inner``: of a sequence, whose strings may be rows."""
    kind = f"a {type(value).__name__}"
    if value is None or isinstance(value, bool | float | np.bool_ | np.floating):
        return _MisfitError(str(value), str(value))
    if isinstance(value, int | np.integer):
        text = str(value) if abs(value) < 10**20 else "a number of over 20 digits"
        return _MisfitError(text, text)
    if not isinstance(value, str) or inner:
        return _MisfitError(kind, kind)
    if half_character(value):
        return _MisfitError("one with half a character", "one with half a character")
    return _MisfitError(repr(str(value)) if len(value) <= MOST_SHOWN else f"{kind} of {len(value)} characters", kind)


@cache
def _conversion(kind: Any) -> Callable[[Any], Any]:
    """What gives a value as ``kind`` has it, or raises `_MisfitError`."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        limits = [limit for limit in args[1:] if isinstance(limit, msgspec.Meta)]
        return partial(_within, convert=_conversion(args[0]), limits=limits)
    if origin in (Union, types.UnionType):
        return _one_of(args)
    if origin in _COLLECTIONS:
        each = [_conversion(inner) for inner in args if inner is not ...]
        return partial(_items, origin=origin, each=each, n=len(args) if origin is tuple and ... not in args else None)
    if origin is os.PathLike or kind is Path:
        return _path_like if origin else lambda value: Path(_path_like(value))
    if kind in (bool, int, float, str):
        return partial(_plain, kind=kind)
    return partial(_unchanged, fits=_test_of(kind, origin, args))


def _test_of(kind: Any, origin: Any, args: tuple[Any, ...]) -> Callable[[Any], bool]:
    if origin is Literal:
        return lambda value: isinstance(value, str | int) and value in args
    if origin is collections.abc.Callable:
        return callable
    if kind is None or kind is types.NoneType:
        return lambda value: value is None
    if origin in (dict, collections.abc.Mapping):
        return lambda value: isinstance(value, collections.abc.Mapping)
    if kind is Any or origin is not None or not isinstance(kind, type):  # to Python 3.10, list[int] is a type
        return lambda _value: True
    if getattr(kind, "_is_protocol", False):
        members = _members_of(kind)
        return lambda value: all(_has(value, name) for name in members)
    return lambda value: isinstance(value, kind)


def _unchanged(value: Any, fits: Callable[[Any], bool]) -> Any:
    if not fits(value):
        raise _misfit(value)
    return value


def _plain(value: Any, kind: type) -> Any:
    if type(value) is str and kind is str and value.isascii():
        return value
    if kind is bool and isinstance(value, bool | np.bool_):
        return bool(value)
    if kind is str and isinstance(value, str) and not half_character(value):
        return value if type(value) is str else str.__str__(value)
    if isinstance(value, bool | np.bool_ | str):
        raise _misfit(value)
    if kind is int and isinstance(value, numbers.Integral):
        whole = value if isinstance(value, int) else operator.index(value)
        if abs(whole) < 2**64:  # no argument is more, and of thousands of digits Python writes none
            return whole
    if kind is float and isinstance(value, numbers.Real):
        try:
            number = float(value)
        except (OverflowError, ValueError):  # of more than 300 digits
            number = math.inf
        if math.isfinite(number):
            return number
    raise _misfit(value)


def _one_of(kinds: tuple[Any, ...]) -> Callable[[Any], Any]:
    if _ARRAYS & set(kinds):
        return lambda value: value
    paths = [_conversion(kind) for kind in kinds if get_origin(kind) is os.PathLike or kind is Path]
    others = [_conversion(kind) for kind in kinds if kind is not types.NoneType]

    def one_of(value: Any) -> Any:
        if value is None and types.NoneType in kinds:
            return None
        for convert in paths if paths and isinstance(value, str) else others:  # what names a file is no other string
            try:
                return convert(value)
            except _MisfitError:
                if len(others) == 1:
                    raise
        raise _misfit(value)

    return one_of


def _items(value: Any, origin: Any, each: list[Callable[[Any], Any]], n: int | None) -> Any:
    """``n``: how many there are, each of a kind of its own; None: any number of one kind."""
    if type(value) not in (tuple, list):
        if isinstance(value, str | bytes | collections.abc.Mapping) or not hasattr(value, "__iter__"):
            raise _misfit(value, inner=True)
        if origin is collections.abc.Iterable and not hasattr(value, "__len__"):  # it may be gone through once
            return value
        if not hasattr(value, "__len__") or (isinstance(value, np.ndarray) and value.ndim == 0):
            raise _misfit(value)
    if n is not None and len(value) != n:
        raise _misfit(value)
    items = []
    for item, convert in zip(value, each if n is not None else repeat(each[0]), strict=False):
        try:
            items.append(convert(item))
        except _MisfitError as error:
            raise _misfit(item, inner=True) from error
    return tuple(items) if origin is tuple else items if origin is list else value


def _within(value: Any, convert: Callable[[Any], Any], limits: list[msgspec.Meta]) -> Any:
    """Checks what ``limits`` say of numbers and strings."""
    found = convert(value)
    for limit in limits:
        size = len(found) if limit.min_length is not None or limit.max_length is not None else 0
        fits = (
            (limit.ge is None or found >= limit.ge)
            and (limit.gt is None or found > limit.gt)
            and (limit.le is None or found <= limit.le)
            and (limit.lt is None or found < limit.lt)
            and (limit.min_length is None or size >= limit.min_length)
            and (limit.max_length is None or size <= limit.max_length)
            and (limit.pattern is None or re.search(limit.pattern, found))
        )
        if not fits:
            raise _misfit(found)
    return found


def _path_like(value: Any) -> Any:
    if isinstance(value, str | os.PathLike) and _names_a_file(os.fspath(value)):
        return value
    raise _misfit(value)


def _has(value: Any, name: str) -> bool:
    """Without asking for it: that may load a model."""
    return hasattr(type(value), name) or inspect.getattr_static(value, name, _ABSENT) is not _ABSENT


def _names_a_file(path: Any) -> bool:
    """Whether the operating system can be asked for it."""
    try:
        name = os.fsencode(path) if isinstance(path, str) else b"\0"
    except UnicodeEncodeError:
        return False
    return b"\0" not in name and len(name) < 4096 and max(map(len, name.split(b"/"))) < 256


def _members_of(protocol: Any) -> tuple[str, ...]:
    named = {name: value for base in protocol.__mro__[:-1] for name, value in vars(base).items()}
    return tuple(
        name
        for name, value in named.items()
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
    )


# --- in words --------------------------------------------------------------------------------------------------------


def _described(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return " ".join(
            [_described(args[0]), *(_bounds(limit) for limit in args[1:] if isinstance(limit, msgspec.Meta))]
        )
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_described, args)))
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(repr, args))
    if origin in _COLLECTIONS:
        if origin is tuple and args[1:] != (...,):
            return f"({', '.join(map(_described, args))})"
        return f"a list, each item {_described(args[0])}"
    if origin in (dict, collections.abc.Mapping):
        return "a dict"
    if origin is collections.abc.Callable:
        return "a function"
    if kind is None or kind is types.NoneType:
        return "None"
    plain = {bool: "True or False", int: "a whole number", float: "a finite number", str: "a string"}
    name = getattr(origin or kind, "__name__", str(kind))
    return plain.get(kind) or _WORDS.get(name) or f"a {name}"


def _bounds(limit: msgspec.Meta) -> str:
    bounds = {"from": limit.ge, "above": limit.gt, "to": limit.le, "below": limit.lt}
    said = [f"{word} {_number(bound)}" for word, bound in bounds.items() if bound is not None]
    if limit.max_length is not None:
        said.append(f"of at most {limit.max_length} characters")
    if limit.pattern is not None:
        said.append(f"that matches {limit.pattern}")
    return " ".join(said)


def _number(bound: float) -> str:
    return "2^63 - 1" if bound == LARGEST else f"{bound:,}" if isinstance(bound, int) else f"{bound:,g}"
