"""Digests of what all devices of a run must have in common about their task."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated

import msgspec

_Digest = Annotated[str, msgspec.Meta(max_length=64)]


class TaskIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The task that a device read its rows for, or that a run tunes. Label names are only in a digest.

    ``name``: for people, truncated. ``labels``: digest of the full task name and the label names, in order.
    ``reading``: digest of how data files become rows (columns, word limit).
    """

    name: Annotated[str, msgspec.Meta(max_length=128)]
    labels: _Digest
    reading: _Digest

    @classmethod
    def of(cls, name: str, labels: Sequence[str], reading: Sequence[object] = ()) -> TaskIdentity:
        """The identity of a task. ``reading``: plain values that determine how its files are read."""
        return cls(name=name[:128], labels=_digest((name, *labels)), reading=_digest(reading))

    def difference(self, run: TaskIdentity) -> str:
        """How this device's task differs from ``run``'s, as a clause about the device; empty: it does not."""
        if self.name != run.name:
            return f"has rows of task {self.name!r}, the run tunes {run.name!r}: start it with the run's task"
        if self.labels != run.labels:
            return (
                f"has a different task {self.name!r}, with other labels or another label order than the run: "
                "start it with the run's task file"
            )
        if self.reading != run.reading:
            return (
                f"reads task {self.name!r} with other text_columns, label_column or max_words than the run: "
                "start it with the run's task file"
            )
        return ""


def _digest(values: Sequence[object]) -> str:
    return hashlib.sha256(msgspec.msgpack.encode(values)).hexdigest()[:16]
