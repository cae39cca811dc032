"""Run-time checks of values against type annotations: a function's arguments (`checked`), the fields of a struct or
dataclass (`check_fields`).

A value of another type raises an error that names the argument, the expected type and the value. numpy scalars become
Python numbers. Types not known here, such as arrays, pass unchecked: the code that uses them checks them.
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

MAX_SHOWN_CHARS: Final = 40
"""Length of the longest string that an error quotes; a longer one may be a row."""

_MODELS: Final = ("Scorer", "BenchScorer", "TextModel", "Tokenizer", "Model")
_DESCRIPTIONS: Final = {
    **dict.fromkeys(_MODELS, "a model, as returned by fedbpt.load_model(NAME)"),
    **dict.fromkeys(("Path", "PathLike"), "a valid file path"),
    "Prompt": "a prompt, as returned by Prompt.load(FILE) or tune(...).prompt",
    "Task": "a task, as returned by fedbpt.tasks.load(NAME)",
}
"""Descriptions of classes by where a caller gets them."""

_ABSENT: Final = object()
_COLLECTIONS: Final = (
    tuple,
    list,
    collections.abc.Sequence,
    collections.abc.Collection,
    collections.abc.Iterable,
)
_ARRAYS: Final = set(get_args(ArrayLike)) - {bool, int, float, complex, str, bytes}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Make ``function`` check its arguments against their annotations and raise `InputError` if one does not fit.

    ``function`` takes no ``*args`` and no ``**kwargs``.
    """
    signature = inspect.signature(function)
    where = function.__qualname__.removesuffix(".__init__")
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
        annotations = _annotations_of(function)
        for name, value in given.items():
            if name in annotations:
                given[name] = _converted(value, annotations[name], where, name, InputError)
        return call(**given)

    return with_fitting_arguments


def check_fields(made: Any) -> None:
    """Check the fields of a frozen struct or dataclass, for ``__post_init__``. Raises `ConfigError`."""
    cls: Any = type(made)
    set_field = msgspec.structs.force_setattr if isinstance(made, msgspec.Struct) else object.__setattr__
    for name, annotation in _annotations_of(cls).items():
        value = getattr(made, name)
        converted = _converted(value, annotation, cls.__name__, name, ConfigError)
        if converted is not value:
            set_field(made, name, converted)


class _NamedFields:
    """Metaclass part that raises `ConfigError` for an unknown or missing field."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc] # a metaclass's
        except TypeError as error:
            fields = ", ".join(_annotations_of(self))
            raise ConfigError(f"{self.__name__}: {error}; expected fields: {fields}") from error


class StructMeta(_NamedFields, msgspec.StructMeta):
    """The metaclass of structs that call `check_fields`."""


class DataclassMeta(_NamedFields, type):
    """The metaclass of dataclasses that call `check_fields`."""


@cache
def _annotations_of(annotated: Any) -> dict[str, Any]:
    hints = get_type_hints(annotated, include_extras=True)
    return {name: annotation for name, annotation in hints.items() if name != "return"}


def as_array(given: Any, name: str) -> NDArray[Any]:
    """Convert the argument ``name`` to an array. Raises `InputError` if it is not one, such as ragged lists."""
    try:
        return np.asarray(given)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{name} must be an array with rows of equal length", field=name) from error


def array_of(given: Any, dtype: type[np.floating[Any]] | type[np.integer[Any]], name: str) -> NDArray[Any]:
    """Copy the argument ``name`` to an array of ``dtype``. Floats that overflow become infinity.

    Raises `InputError` for other types, and for integers outside the range of ``dtype``.
    """
    expected = f"{name} must be an array of {'whole numbers' if issubclass(dtype, np.integer) else 'numbers'}"
    found = as_array(given, name)
    if found.size and found.dtype.kind not in ("iu" if issubclass(dtype, np.integer) else "fiu"):
        raise InputError(f"{expected}, got {found.dtype}", field=name)
    if issubclass(dtype, np.integer) and found.size:
        bounds = np.iinfo(dtype)
        if int(found.min()) < bounds.min or int(found.max()) > bounds.max:
            raise InputError(f"{expected} from {bounds.min} to {bounds.max}", field=name)
    with np.errstate(over="ignore"):
        return np.array(found, dtype=dtype)


class _MisfitError(Exception):
    """A value of the wrong type. ``given`` describes it; ``public`` does so without quoting a string."""

    def __init__(self, given: str, public: str) -> None:
        super().__init__(given)
        self.given = given
        self.public = public


def _converted(value: Any, annotation: Any, where: str, name: str, error: type[InputError]) -> Any:
    try:
        return _conversion(annotation)(value)
    except _MisfitError as misfit:
        expected = f"{where}: {name} must be {_described(annotation)}, got"
        raise error(f"{expected} {misfit.given}", public=f"{expected} {misfit.public}", field=name) from None


def _misfit(value: Any, *, inner: bool = False) -> _MisfitError:
    """``inner``: the value is an item of a sequence, whose strings may be rows."""
    type_name = f"a {type(value).__name__}"
    if value is None or isinstance(value, bool | float | np.bool_ | np.floating):
        return _MisfitError(str(value), str(value))
    if isinstance(value, int | np.integer):
        text = str(value) if abs(value) < 10**20 else "a number of over 20 digits"
        return _MisfitError(text, text)
    if not isinstance(value, str) or inner:
        return _MisfitError(type_name, type_name)
    if half_character(value):
        return _MisfitError("one with half a character", "one with half a character")
    shown = repr(str(value)) if len(value) <= MAX_SHOWN_CHARS else f"{type_name} of {len(value)} characters"
    return _MisfitError(shown, type_name)


@cache
def _conversion(kind: Any) -> Callable[[Any], Any]:
    """Return a function that converts a value to ``kind`` or raises `_MisfitError`."""
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
    if kind is Any or origin is not None or not isinstance(kind, type):  # in Python 3.10, list[int] is a type
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
        if abs(whole) < 2**64:  # no argument is larger, and Python does not print integers of thousands of digits
            return whole
    if kind is float and isinstance(value, numbers.Real):
        try:
            number = float(value)
        except (OverflowError, ValueError):  # an integer of more than 300 digits
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
        # where a path is accepted, a string is always a path
        for convert in paths if paths and isinstance(value, str) else others:
            try:
                return convert(value)
            except _MisfitError:
                if len(others) == 1:
                    raise
        raise _misfit(value)

    return one_of


def _items(value: Any, origin: Any, each: list[Callable[[Any], Any]], n: int | None) -> Any:
    """Convert a collection. ``n``: its length, with one converter for each item; None: any length, one converter."""
    if type(value) not in (tuple, list):
        if isinstance(value, str | bytes | collections.abc.Mapping) or not hasattr(value, "__iter__"):
            raise _misfit(value, inner=True)
        if origin is collections.abc.Iterable and not hasattr(value, "__len__"):  # may be iterated over only once
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
    """Convert a number or string, then check it against ``limits``."""
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
    if isinstance(value, str | os.PathLike) and _is_valid_path(os.fspath(value)):
        return value
    raise _misfit(value)


def _has(value: Any, name: str) -> bool:
    """Whether ``value`` has the attribute, without evaluating it: a property may load a model."""
    return hasattr(type(value), name) or inspect.getattr_static(value, name, _ABSENT) is not _ABSENT


def _is_valid_path(path: Any) -> bool:
    """Whether the operating system accepts ``path``; the file need not exist."""
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


# --- descriptions ----------------------------------------------------------------------------------------------------


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
        return f"a list with each item {_described(args[0])}"
    if origin in (dict, collections.abc.Mapping):
        return "a dict"
    if origin is collections.abc.Callable:
        return "a function"
    if kind is None or kind is types.NoneType:
        return "None"
    plain = {bool: "True or False", int: "a whole number", float: "a finite number", str: "a string"}
    name = getattr(origin or kind, "__name__", str(kind))
    return plain.get(kind) or _DESCRIPTIONS.get(name) or f"a {name}"


def _bounds(limit: msgspec.Meta) -> str:
    bounds = {"from": limit.ge, "above": limit.gt, "to": limit.le, "below": limit.lt}
    described = [f"{word} {_number(bound)}" for word, bound in bounds.items() if bound is not None]
    if limit.max_length is not None:
        described.append(f"of at most {limit.max_length} characters")
    if limit.pattern is not None:
        described.append(f"that matches {limit.pattern}")
    return " ".join(described)


def _number(bound: float) -> str:
    return "2^63 - 1" if bound == LARGEST else f"{bound:,}" if isinstance(bound, int) else f"{bound:,g}"
