"""Prometheus' text format, version 0.0.4: what ``GET /metrics`` answers, of a device and of the coordinator."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal, NamedTuple

from fedbpt.plain_text import plain

CONTENT_TYPE: Final = "text/plain; version=0.0.4"

_ESCAPES: Final = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


class Sample(NamedTuple):
    """One value. ``suffix`` is added to the family's name: ``_bucket``, ``_sum``, ``_count`` of a histogram."""

    value: float
    labels: Mapping[str, str] = {}
    suffix: str = ""


class Family(NamedTuple):
    """A metric: its ``name`` without ``fedbpt_``, and its samples."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    what: str
    samples: Sequence[Sample]


def exposition(families: Iterable[Family]) -> str:
    """The text; families without a sample are left out."""
    lines: list[str] = []
    for name, kind, what, samples in families:
        if samples:
            lines += [f"# HELP fedbpt_{name} {what}", f"# TYPE fedbpt_{name} {kind}"]
        lines += [f"fedbpt_{name}{suffix}{_labels(labels)} {value}" for value, labels, suffix in samples]
    return "\n".join(lines) + "\n"


class Histogram:
    """Counts values by upper ``bounds``, ascending."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def samples(self, labels: Mapping[str, str]) -> list[Sample]:
        """Of a `Family`: cumulative buckets, sum, count."""
        found, total = [], 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            found.append(Sample(total, {**labels, "le": bound}, "_bucket"))
        return [*found, Sample(self._sum, labels, "_sum"), Sample(total, labels, "_count")]


def _labels(labels: Mapping[str, str]) -> str:
    inside = ",".join(f'{name}="{plain(value).translate(_ESCAPES)}"' for name, value in labels.items())
    return f"{{{inside}}}" if inside else ""
