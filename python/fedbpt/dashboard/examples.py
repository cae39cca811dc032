"""`Examples`: held-out rows grouped by which of the two models classifies them correctly."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Literal, NamedTuple, TypeAlias

from fedbpt.side_by_side.sides import Probabilities

Kind: TypeAlias = Literal["gained", "lost", "both", "neither"]

KINDS: Final[dict[Kind, str]] = {
    "gained": "Only the tuned model is right",
    "lost": "Only the original model is right",
    "both": "Both are right",
    "neither": "Both are wrong",
}


class Row(NamedTuple):
    """A held-out row. ``expected``: the name of its correct label, or its target text."""

    text: str
    expected: str


class Verdict(NamedTuple):
    """A row with the labels that both models predict."""

    row: Row
    original: str
    tuned: str

    @property
    def kind(self) -> Kind:
        if self.tuned == self.row.expected:
            return "both" if self.original == self.row.expected else "gained"
        return "lost" if self.original == self.row.expected else "neither"


class Examples:
    """Classifies ``rows`` one by one, all of them, so that the counts are unbiased. Thread-safe.

    Args:
        rows: held-out rows.
        labels: names of the labels.
        classify: returns both models' probabilities of the ``labels`` for a text.
    """

    def __init__(self, rows: Sequence[Row], labels: Sequence[str], classify: Callable[[str], Probabilities]) -> None:
        self.n_rows = len(rows)
        self._left = iter(rows)
        self._labels = labels
        self._classify = classify
        self._lock = threading.Lock()
        self._verdicts: list[Verdict] = []

    @property
    def verdicts(self) -> Sequence[Verdict]:
        """The verdicts so far, in the order of the rows."""
        return tuple(self._verdicts)

    @property
    def done(self) -> bool:
        """Whether all rows are classified."""
        return len(self._verdicts) == self.n_rows

    def classify_next(self) -> bool:
        """Classify the next row. Returns False if there is none; raises what ``classify`` does."""
        with self._lock:
            row = next(self._left, None)
            if row is None:
                return False
            original, tuned = (self._labels[side.index(max(side))] for side in self._classify(row.text))
            self._verdicts.append(Verdict(row, original, tuned))
            return True

    def find(self, kind: Kind) -> Iterator[Verdict]:
        """Yield verdicts of ``kind``, classifying more rows as needed."""
        seen = 0
        while True:
            known = self.verdicts
            yield from (verdict for verdict in known[seen:] if verdict.kind == kind)
            seen = len(known)
            if not self.classify_next() and len(self._verdicts) == seen:
                return

    def counts(self) -> Counter[Kind]:
        """Number of verdicts of each kind so far."""
        return Counter(verdict.kind for verdict in self.verdicts)

    def n_differ(self) -> int:
        """Number of rows for which the two models predict different labels."""
        return sum(verdict.original != verdict.tuned for verdict in self.verdicts)
