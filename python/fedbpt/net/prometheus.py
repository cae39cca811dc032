"""Prometheus' text format, version 0.0.4, for ``GET /metrics`` of devices and of the coordinator."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal, NamedTuple

from fedbpt.plain_text import plain

CONTENT_TYPE: Final = "text/plain; version=0.0.4"

_ESCAPES: Final = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


class Sample(NamedTuple):
    """A value. ``suffix`` is appended to the family's name: ``_bucket``, ``_sum``, ``_count`` of a histogram."""

    value: float
    labels: Mapping[str, str] = {}
    suffix: str = ""


class Family(NamedTuple):
    """A metric. ``name``: without the prefix ``fedbpt_``; ``what``: its help text."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    what: str
    samples: Sequence[Sample]


def exposition(families: Iterable[Family]) -> str:
    """Render families as text, without those that have no samples."""
    lines: list[str] = []
    for name, kind, what, samples in families:
        if samples:
            lines += [f"# HELP fedbpt_{name} {what}", f"# TYPE fedbpt_{name} {kind}"]
        lines += [f"fedbpt_{name}{suffix}{_labels(labels)} {value}" for value, labels, suffix in samples]
    return "\n".join(lines) + "\n"


class Histogram:
    """A histogram with ascending upper ``bounds``."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def samples(self, labels: Mapping[str, str]) -> list[Sample]:
        """The samples for a `Family`: cumulative buckets, sum, count."""
        found = []
        total = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            found.append(Sample(total, {**labels, "le": bound}, "_bucket"))
        return [*found, Sample(self._sum, labels, "_sum"), Sample(total, labels, "_count")]


def _labels(labels: Mapping[str, str]) -> str:
    inside = ",".join(f'{name}="{plain(value).translate(_ESCAPES)}"' for name, value in labels.items())
    return f"{{{inside}}}" if inside else ""
