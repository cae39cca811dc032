"""What must be the same about the task of all devices of a run, as digests."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated

import msgspec

_Digest = Annotated[str, msgspec.Meta(max_length=64)]


class TaskIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The task that a device read its rows for, or that a run tunes. It holds no label name.

    ``name``: for people, cut. ``labels``: digest of the full name and the label names in their order. ``reading``:
    digest of how data files become rows (columns, word limit).
    """

    name: Annotated[str, msgspec.Meta(max_length=128)]
    labels: _Digest
    reading: _Digest

    @classmethod
    def of(cls, name: str, labels: Sequence[str], reading: Sequence[object] = ()) -> TaskIdentity:
        """The identity of a task; ``reading``: plain values that decide how its files are read."""
        return cls(name=name[:128], labels=_digest((name, *labels)), reading=_digest(reading))

    def difference(self, run: TaskIdentity) -> str:
        """How a device with this task differs from ``run``'s, as the end of a sentence about it; empty: it does not."""
        if self.name != run.name:
            return f"has rows of task {self.name!r}, the run is of task {run.name!r}: start it with the run's task"
        if self.labels != run.labels:
            return (
                f"has another task {self.name!r}: the names, the number or the order of its labels are not the run's: "
                "start it with the run's task file"
            )
        if self.reading != run.reading:
            return (
                f"reads rows of task {self.name!r} otherwise: its text_columns, label_column or max_words are not the "
                "run's: start it with the run's task file"
            )
        return ""


def _digest(values: Sequence[object]) -> str:
    return hashlib.sha256(msgspec.msgpack.encode(values)).hexdigest()[:16]
