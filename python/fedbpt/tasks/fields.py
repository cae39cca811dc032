"""What the fields of a row mean: which of them are its text and its label, and which label a value stands for.

Every reader asks here, so that a row means the same wherever it comes from.
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
_WHOLE: Final = re.compile(r"([+-]?[0-9]{1,15})(\.0*)?")  # also as a spreadsheet writes a column with gaps: 1.0

MOST_NUMBER: Final = 10**15

MAX_LISTED: Final = 20
"""Names that an error lists at most."""

NO_HEADER: Final = "this looks like a row, write a header line above it (text,label)"

MAX_HEADING: Final = (40, 4)
"""Characters and words of a column's name; what is longer is taken for a row where a header should be."""


class Columns(NamedTuple):
    """Where rows have their text and their label: names as in `fedbpt.tasks.Task`.

    ``labels``: of the task, by which a first row is told from a header that should be there.
    """

    text: tuple[str, ...]
    label: str
    labels: tuple[str, ...] = ()

    def bind(self, names: Sequence[str], where: str) -> Fields:
        """Find the columns among ``names``: as they are written, else whatever their case and white space.

        Raises `DataError` where one is missing, or could be either of two.
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
        if looks_like_row(names, self.labels):
            return DataError(f"{problem}: {NO_HEADER}")
        # Where the file has no header, its first row's fields stand for the columns' names.
        return DataError(f"{problem}: the columns are {listed(names)}", public=problem)


class Fields(NamedTuple):
    """The columns of rows that all have columns ``names``: ``places`` are those of the text's parts.

    ``words`` stand before, between and after the parts: one more than those.
    """

    names: tuple[str, ...]
    words: tuple[str, ...]
    places: tuple[int, ...]
    label: int

    def text(self, values: Sequence[Any], where: str) -> str:
        """A row's text. Raises `DataError` where it, or a part of it, is empty or no string."""
        if self.words == ("", ""):
            return read_text(values[self.places[0]], where)
        parts = [read_text(values[place], f"{where}, column {self.names[place]!r}") for place in self.places]
        text = self.words[0] + "".join(part + word for part, word in zip(parts, self.words[1:], strict=True))
        return read_text(text, where)


PAIR: Final = Fields(("text", "label"), ("", ""), (0,), 1)
"""Of a pair, which has no columns."""


def read_text(value: Any, where: str) -> str:
    """A text without the white space around it. Raises `DataError`."""
    if value is None or (isinstance(value, float) and math.isnan(value)):  # as tables write a field that is missing
        value = ""
    if not isinstance(value, str):
        raise DataError(f"{where}: the text must be a string, got {type(value).__name__}")
    if not value.strip():
        raise DataError(f"{where}: empty text: fill it in or remove the row")
    if half := half_character(value):
        raise DataError(f"{where}: {half}: the text was cut within an emoji, or is no UTF-8; mend it or remove the row")
    return value.strip()


class LabelReader:
    """Reads the values of a label column for a task with ``labels``; with none, they are target texts.

    A name decides where there is one: as it is written, else whatever its case and white space. A whole number is an
    index only where it cannot be a name: no label is a number, and this number is in no other label's name. What is
    neither is refused.

    Args:
        labels: the task's, in order.
        data_names: what the data itself calls its numbered labels (`datasets.ClassLabel`); None: nothing. These names
            decide then, and must be the task's, in whatever order and case.
    """

    def __init__(self, labels: Sequence[str], data_names: Sequence[str] | None = None) -> None:
        self._labels = tuple(labels)
        numbered = data_names is not None and list(data_names) == [str(i) for i in range(len(data_names))]
        self._data_names = None if data_names is None or numbered else tuple(data_names)
        self._indices = [LabelIndex(i, name) for i, name in enumerate(labels)]  # rows of one label share one
        self._exact = {name: i for i, name in enumerate(labels)}
        self._folded = _unique((fold(name), i) for i, name in enumerate(labels))
        self._numbers = any(_NUMBER.fullmatch(name.strip()) for name in labels)
        self._values = _unique((value, i) for i, name in enumerate(labels) if (value := whole_number(name)) is not None)
        self._within: dict[int, set[str]] = {}
        for name in labels:
            for digits in re.findall(r"[0-9]{1,15}", name):
                self._within.setdefault(int(digits), set()).add(name)

    def read(self, value: Any, where: str) -> LabelIndex | str:
        """The index of the label that ``value`` stands for, or the target text. Raises `DataError`."""
        if not self._labels:
            return read_text(value, f"{where}, target")
        given = value.name if isinstance(value, LabelIndex) else _plain(value)
        return self._indices[self._index(given, where)]

    def _index(self, value: Any, where: str) -> int:
        if self._data_names is not None and type(value) is int:
            return self._by_data_name(value, where)
        if isinstance(value, str | bool) and (found := self._by_name(str(value))) is not None:
            return found
        if isinstance(value, int) and abs(value) > MOST_NUMBER:  # Python writes none of thousands of digits
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
            raise _refusal(f"label {value!r} may mean {either}: give names instead of numbers", where)
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
            known = f"none of the task's, {listed(self._labels)}: call it the same in both"
            raise _refusal(f"the data calls its label {value} {names[value]!r}, which is {known}", where)
        return found

    def _unknown(self, value: Any, where: str) -> DataError:
        indexed = self._labels if self._numbers else [f"{i} {name}" for i, name in enumerate(self._labels)]
        return _refusal(f"unknown label {value!r}: give one of {listed(indexed)}", where)


def looks_like_row(names: Sequence[str], labels: Iterable[str] = ()) -> bool:
    """Whether what stands for the columns' names may be a row of a file without a header; ``labels``: of its task."""
    known = {fold(label) for label in labels}
    return any(
        len(name) > MAX_HEADING[0]
        or len(name.split()) > MAX_HEADING[1]
        or fold(name) in known
        or whole_number(name) is not None
        for name in names
    )


def whole_number(value: Any) -> int | None:
    """The whole number that ``value`` is, or that stands in it; None: it is none."""
    if isinstance(value, str):
        found = _WHOLE.fullmatch(value.strip())
        return None if found is None else int(found[1])
    return value if type(value) is int else None


def fold(name: str) -> str:
    """``name`` without what people write now one way, now another: case, white space, Unicode forms."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _plain(value: Any) -> Any:
    """A label's value as Python's own: numbers of numpy, pandas and PyTorch, and floats that are whole."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, bool | str) and hasattr(value, "__index__"):
        return operator.index(value)
    return value


def _unique(pairs: Iterable[tuple[Any, int]]) -> dict[Any, int]:
    """The pairs whose key comes once."""
    known = list(pairs)
    counts = Counter(key for key, _ in known)
    return {key: value for key, value in known if counts[key] == 1}


def _parts(name: str) -> list[str]:
    """Words and column names in turn, words first and last: ``{premise} So: {hypothesis}``, or one column."""
    parts = re.split(r"\{([^{}]+)\}", name)
    return parts if len(parts) > 1 else ["", name, ""]


def _place(names: Sequence[str], wanted: str, where: str, exact: bool | None = None) -> int | None:
    """Where ``wanted`` is among ``names``; ``exact``: as it is written, or not; None: the one, else the other."""
    found = [i for i, name in enumerate(names) if name == wanted]
    if not found and not exact:
        found = [i for i, name in enumerate(names) if fold(name) == fold(wanted)]
    if len(found) > 1:
        which = " and ".join(dict.fromkeys(repr(names[i]) for i in found))
        raise DataError(f"{where}: column {wanted!r} is there {len(found)} times, as {which}: rename all but one")
    return found[0] if found else None


def _refusal(problem: str, where: str) -> DataError:
    return DataError(f"{where}: {problem}", public=f"{where}: its label is none of the task's, or not clearly one")


def listed(names: Sequence[str]) -> str:
    """Names for people, the first `MAX_LISTED` of them."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
