"""The text and label columns of rows, and the label that a value stands for.

All readers use this module, so that a row means the same in every format.
"""

from __future__ import annotations

import math
import operator
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from fedbpt.checking import half_character
from fedbpt.errors import DataError
from fedbpt.tasks.rows import LabelIndex

_NUMBER: Final = re.compile(r"[+-]?[0-9]+([.,][0-9]+)?")
_WHOLE: Final = re.compile(r"([+-]?[0-9]{1,15})(\.0*)?")  # spreadsheets write an integer column with gaps as 1.0

MAX_NUMBER: Final = 10**15
"""Largest label number that an error quotes."""

MAX_LISTED: Final = 20
"""Maximum number of names in one error."""

NO_HEADER: Final = "this looks like a row: add a header line above it (text,label)"

MAX_COLUMN_NAME_CHARS: Final = 40
MAX_COLUMN_NAME_WORDS: Final = 4
"""A first line with a longer field is taken for a row: the header is missing."""


class Columns(NamedTuple):
    """The names of the text and label columns, as in `fedbpt.tasks.Task`.

    ``labels``: the task's labels; a first line that holds one is a row, not a header.
    """

    text: tuple[str, ...]
    label: str
    labels: tuple[str, ...] = ()

    def bind(self, names: Sequence[str], where: str) -> Fields:
        """Find the columns among ``names``: by exact name, else ignoring case and white space.

        Raises `DataError` if one is missing or ambiguous.
        """
        label = _place(names, self.label, where)
        candidates = [_parts(name) for name in self.text]
        for exact in (True, False):
            for parts in candidates:
                found = [_place(names, part, where, exact) for part in parts[1::2]]
                places = tuple(place for place in found if place is not None)
                if len(places) < len(found):
                    continue
                if label is None:
                    raise self._missing(names, (self.label,), where)
                return Fields(tuple(names), tuple(parts[::2]), places, label)
        raise self._missing(names, self.text, where)

    def _missing(self, names: Sequence[str], wanted: Sequence[str], where: str) -> DataError:
        problem = f"{where}: no column {' or '.join(repr(name) for name in wanted)}"
        field = wanted[0] if wanted else ""
        if looks_like_row(names, self.labels):
            own = f"({','.join((*_parts(self.text[0])[1::2], self.label))})"
            return DataError(f"{problem}: {NO_HEADER.replace('(text,label)', own)}", field=field)
        # public: without a header, the names may be a row's fields
        message = f"{problem}: name it in the task, or rename one of {listed(names)}"
        return DataError(message, public=problem, field=field)


class Fields(NamedTuple):
    """Positions of the text and label in rows with columns ``names``.

    ``places``: positions of the text's parts. ``words``: the fixed words before, between and after them, one more than
    there are parts. ``label``: position of the label.
    """

    names: tuple[str, ...]
    words: tuple[str, ...]
    places: tuple[int, ...]
    label: int

    def text(self, values: Sequence[Any], where: str) -> str:
        """Build a row's text. Raises `DataError` if it or a part of it is empty or not a string."""
        if self.words == ("", ""):
            return read_text(values[self.places[0]], where)
        parts = [read_text(values[place], f"{where}, column {self.names[place]!r}") for place in self.places]
        text = self.words[0] + "".join(part + word for part, word in zip(parts, self.words[1:], strict=True))
        return read_text(text, where)


PAIR: Final = Fields(("text", "label"), ("", ""), (0,), 1)
"""The fields of a (text, label) pair, which has no columns."""


def read_text(value: Any, where: str) -> str:
    """Check a text and strip white space around it. Raises `DataError`."""
    if value is None or (isinstance(value, float) and math.isnan(value)):  # how tables represent a missing field
        value = ""
    if not isinstance(value, str):
        raise DataError(f"{where}: the text must be a string, got {type(value).__name__}", field="text")
    if not value.strip():
        raise DataError(f"{where}: empty text: fill it in or remove the row", field="text")
    if half := half_character(value):
        raise DataError(
            f"{where}: {half}, cut within an emoji or not UTF-8: fix the text or remove the row", field="text"
        )
    return value.strip()


class LabelReader:
    """Reads the values of a label column for a task with ``labels``; without labels, they are target texts.

    A value that names a label is that label: by exact name, else ignoring case and white space. An integer is an index
    only if it cannot be a name: no label is a number, and the number is in no other label's name. Any other value is an
    error.

    Args:
        labels: the task's labels, in order.
        data_names: names that the data set gives its numbered labels (`datasets.ClassLabel`), or None. Numbers then
            stand for these names, each of which must be one of the task's labels, in any order and case.
    """

    def __init__(self, labels: Sequence[str], data_names: Sequence[str] | None = None) -> None:
        self._labels = tuple(labels)
        numbered = data_names is not None and list(data_names) == [str(i) for i in range(len(data_names))]
        self._data_names = None if data_names is None or numbered else tuple(data_names)
        self._indices = [LabelIndex(i, name) for i, name in enumerate(labels)]  # shared by the rows of a label
        self._exact = {name: i for i, name in enumerate(labels)}
        self._folded = _unique((fold(name), i) for i, name in enumerate(labels))
        self._numbers = any(_NUMBER.fullmatch(name.strip()) for name in labels)
        self._values = _unique((value, i) for i, name in enumerate(labels) if (value := whole_number(name)) is not None)
        self._within: dict[int, set[str]] = {}
        for name in labels:
            for digits in re.findall(r"[0-9]{1,15}", name):
                self._within.setdefault(int(digits), set()).add(name)

    def read(self, value: Any, where: str) -> LabelIndex | str:
        """Return the index of the label that ``value`` stands for, or the target text. Raises `DataError`."""
        if not self._labels:
            return read_text(value, f"{where}, target")
        given = value.name if isinstance(value, LabelIndex) else _plain(value)
        return self._indices[self._index(given, where)]

    def _index(self, value: Any, where: str) -> int:
        if self._data_names is not None and type(value) is int:
            return self._by_data_name(value, where)
        if isinstance(value, str | bool) and (found := self._by_name(str(value))) is not None:
            return found
        if isinstance(value, int) and abs(value) > MAX_NUMBER:  # Python does not print integers of thousands of digits
            value = "a number of over 15 digits"
        number = None if self._data_names else whole_number(value)
        if number is None:
            raise self._unknown(value, where)
        if self._numbers:
            named = self._exact.get(str(number), self._values.get(number))
            if named is None:
                raise self._unknown(value, where)
            return named
        if not 0 <= number < len(self._labels):
            raise self._unknown(value, where)
        if others := self._within.get(number, set()) - {self._labels[number]}:
            either = f"{min(others)!r}, or number {number} of the labels, {self._labels[number]!r}"
            raise _label_error(f"label {value!r} may mean {either}: use names instead of numbers", where)
        return number

    def _by_name(self, name: str) -> int | None:
        found = self._exact.get(name, self._exact.get(name.strip()))
        return self._folded.get(fold(name)) if found is None else found

    def _by_data_name(self, value: int, where: str) -> int:
        names = self._data_names or ()
        if not 0 <= value < len(names):
            raise self._unknown(value, where)
        found = self._by_name(names[value])
        if found is None:
            problem = f"the data set names its label {value} {names[value]!r}"
            raise _label_error(f"{problem}: rename it to one of the task's, {listed(self._labels)}", where)
        return found

    def _unknown(self, value: Any, where: str) -> DataError:
        indexed = self._labels if self._numbers else [f"{i} {name}" for i, name in enumerate(self._labels)]
        return _label_error(f"unknown label {value!r}: use one of {listed(indexed)}", where)


def looks_like_row(names: Sequence[str], labels: Iterable[str] = ()) -> bool:
    """Whether ``names``, from a file's first line, may be a row: the header is missing. ``labels``: the task's."""
    known = {fold(label) for label in labels}
    return any(
        len(name) > MAX_COLUMN_NAME_CHARS
        or len(name.split()) > MAX_COLUMN_NAME_WORDS
        or fold(name) in known
        or whole_number(name) is not None
        for name in names
    )


def whole_number(value: Any) -> int | None:
    """Convert an integer, or a string that holds one, to int; None for any other value."""
    if isinstance(value, str):
        found = _WHOLE.fullmatch(value.strip())
        return None if found is None else int(found[1])
    return value if type(value) is int else None


def fold(name: str) -> str:
    """Normalise case, white space and Unicode form, for comparison."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _plain(value: Any) -> Any:
    """Convert numbers of numpy, pandas and PyTorch to Python's, and integral floats to int."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, bool | str) and hasattr(value, "__index__"):
        return operator.index(value)
    return value


def _unique(pairs: Iterable[tuple[Any, int]]) -> dict[Any, int]:
    """The pairs whose key occurs once."""
    known = list(pairs)
    counts = Counter(key for key, _ in known)
    return {key: value for key, value in known if counts[key] == 1}


def _parts(name: str) -> list[str]:
    """Split ``{premise} So: {hypothesis}``, or one column's name, into words and names in turn; words come first."""
    parts = re.split(r"\{([^{}]+)\}", name)
    return parts if len(parts) > 1 else ["", name, ""]


def _place(names: Sequence[str], wanted: str, where: str, exact: bool | None = None) -> int | None:
    """Position of ``wanted`` among ``names``. ``exact``: match case and white space; None: prefer an exact match."""
    found = [i for i, name in enumerate(names) if name == wanted]
    if not found and not exact:
        found = [i for i, name in enumerate(names) if fold(name) == fold(wanted)]
    if len(found) > 1:
        which = " and ".join(dict.fromkeys(repr(names[i]) for i in found))
        raise DataError(
            f"{where}: column {wanted!r} occurs {len(found)} times, as {which}: rename all but one", field=wanted
        )
    return found[0] if found else None


def _label_error(problem: str, where: str) -> DataError:
    public = f"{where}: its label is unknown or ambiguous"
    return DataError(f"{where}: {problem}", public=public, field="label")


def listed(names: Sequence[str]) -> str:
    """Join names with commas, the first `MAX_LISTED` of them."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
