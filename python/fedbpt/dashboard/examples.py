"""`Examples`: held-out rows by what both models say to them, so that people see where these differ, and how often."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Literal, NamedTuple, TypeAlias

from fedbpt.side_by_side.sides import Probabilities

Kind: TypeAlias = Literal["gained", "lost", "both", "neither"]

KINDS: Final[dict[Kind, str]] = {
    "gained": "Only the tuned model is right",
    "lost": "Only the original is right",
    "both": "Both are right",
    "neither": "Both are wrong",
}


class Row(NamedTuple):
    """A held-out row; ``answer``: its label's name, or its target text."""

    text: str
    answer: str


class Verdict(NamedTuple):
    """The labels that both models give a row."""

    row: Row
    original: str
    tuned: str

    @property
    def kind(self) -> Kind:
        if self.tuned == self.row.answer:
            return "both" if self.original == self.row.answer else "gained"
        return "lost" if self.original == self.row.answer else "neither"


class Examples:
    """``rows`` as they are looked at, each once and all of them, so that no kind is chosen. From any thread.

    Args:
        classify: both models' probabilities of the ``labels`` for a text.
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
        """So far, in the order of the rows."""
        return tuple(self._verdicts)

    @property
    def done(self) -> bool:
        """Whether all rows were looked at."""
        return len(self._verdicts) == self.n_rows

    def look(self) -> bool:
        """Look at one more row; whether there was one. Raises what ``classify`` does."""
        with self._lock:
            row = next(self._left, None)
            if row is None:
                return False
            original, tuned = (self._labels[side.index(max(side))] for side in self._classify(row.text))
            self._verdicts.append(Verdict(row, original, tuned))
            return True

    def find(self, kind: Kind) -> Iterator[Verdict]:
        """Those of ``kind``, looking for more as long as there are rows."""
        seen = 0
        while True:
            known = self.verdicts
            yield from (verdict for verdict in known[seen:] if verdict.kind == kind)
            seen = len(known)
            if not self.look() and len(self._verdicts) == seen:
                return

    def counts(self) -> Counter[Kind]:
        """How many there are of each kind so far."""
        return Counter(verdict.kind for verdict in self.verdicts)

    def n_differ(self) -> int:
        """How many rows the two models give different labels."""
        return sum(verdict.original != verdict.tuned for verdict in self.verdicts)
