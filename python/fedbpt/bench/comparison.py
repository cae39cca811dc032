"""Comparison of two measurements, read from the output of ``fedbpt bench --json``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from fedbpt.bench.measurement import Measurement
from fedbpt.checking import DECODE_ERRORS
from fedbpt.decoders import from_json
from fedbpt.errors import DataError


class Comparison(msgspec.Struct, frozen=True):
    """Two measurements compared. ``figures``: (first, second) by name; ``notes``: other differences that matter."""

    figures: Mapping[str, tuple[float, float]]
    notes: tuple[str, ...]

    def ratios(self) -> dict[str, float]:
        """Second divided by first, without figures whose first value is 0."""
        return {name: second / first for name, (first, second) in self.figures.items() if first}


def read_measurement(path: Path) -> Measurement:
    """Read a measurement. Raises `DataError` if the file is missing, not JSON, or not a measurement."""
    try:
        return from_json(path.read_bytes(), Measurement)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except msgspec.ValidationError as error:
        raise DataError(f"{path} is not the output of this version's `fedbpt bench --json`: {error}") from error
    except DECODE_ERRORS as error:
        raise DataError(f"{path} is not valid JSON, as `fedbpt bench --json` writes it: {error}") from error


def compare(first: Measurement, second: Measurement) -> Comparison:
    """Compare the figures that both measurements have."""
    others = dict(_figures(second))
    figures = {name: (value, others[name]) for name, value in _figures(first) if name in others}
    return Comparison(figures, tuple(_notes(first, second)))


def _figures(found: Measurement) -> Iterator[tuple[str, float]]:
    for name, rate in {"prefill": found.prefill, "cue": found.cue, "front": found.front}.items():
        yield f"{name} tokens/s", rate.tokens_per_second
        if name != "prefill":
            yield f"{name} evaluations/s", rate.evaluations_per_second
        if rate.joules_per_evaluation is not None:
            yield f"{name} J/evaluation", rate.joules_per_evaluation
    for rate in found.batches:
        yield f"{rate.work.texts} x {rate.work.text_tokens} tokens/s", rate.tokens_per_second
    for by_threads in found.threads:
        yield f"{by_threads.n_threads} threads tokens/s", by_threads.tokens_per_second
    for name, size in found.memory_bytes.items():
        yield f"{name} MB", size / 1e6
    for name, flops in found.kernel_flops_per_second.items():
        yield f"{name} GFLOP/s", flops / 1e9
    if found.projection is not None:
        yield "projected run, s", found.projection.seconds


def _notes(first: Measurement, second: Measurement) -> Iterator[str]:
    if first.model_fingerprint != second.model_fingerprint:
        yield f"different models: {first.model} and {second.model} ({_short(first)} and {_short(second)})"
    for field, what in {
        "fedbpt_version": "different versions of fedbpt",
        "cpu": "different processors",
        "backend": "different backends",
        "n_threads": "different numbers of threads",
    }.items():
        values = getattr(first, field), getattr(second, field)
        if values[0] != values[1]:
            yield f"{what}: {values[0]} and {values[1]}"
    if first.projection and second.projection:
        runs = [(run.task, run.rows, run.evaluations) for run in (first.projection, second.projection)]
        if runs[0] != runs[1]:
            yield f"projections of different runs: {runs[0]} and {runs[1]}"
    for found, which in ((first, "first"), (second, "second")):
        if found.heat_after.limited:
            yield f"the {which} was throttled by heat"


def _short(found: Measurement) -> str:
    return found.model_fingerprint.removeprefix("sha256:")[:12]
