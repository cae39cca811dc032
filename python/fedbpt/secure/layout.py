"""A result as one vector whose sum over devices gives the result over all their rows, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray

from fedbpt.errors import InputError, WireError
from fedbpt.protocol.rounds import (
    CrossResult,
    EvaluateReport,
    FitPurpose,
    FitResult,
    LogisticResult,
    MaskedField,
    MaskedResult,
    MeansResult,
    MomentsResult,
    PooledResult,
    Result,
    SecureUse,
    SelectResult,
    SketchResult,
)
from fedbpt.protocol.specs import Array
from fedbpt.secure.fixed_point import pack, pack_states, unpack, unpack_states

Floats = NDArray[np.float64]

_SUMS: Final[Mapping[type, tuple[str, ...]]] = {
    SelectResult: ("loss_sums", "correct", "label_counts"),
    CrossResult: ("loss_sums",),
    SketchResult: ("counts",),
    MeansResult: ("label_sums", "state_sums", "word_sums"),
}
"""Fields that are sums over rows."""

_MEANS: Final[Mapping[type, tuple[str, ...]]] = {
    PooledResult: ("losses",),
    SelectResult: ("sizes",),
    FitResult: ("loss", "means"),
    SketchResult: ("loss", "word_means"),
    MomentsResult: ("loss", "means", "squares", "word_means", "word_squares"),
    LogisticResult: ("losses", "by_weights", "by_word_scales", "by_bias"),
}
"""Fields that are means over rows."""

_STATES: Final[Mapping[type, tuple[str, ...]]] = {SketchResult: ("sums", "squares", "sketches")}
"""Sums over rows of states and of their products, in 32 bits."""

_INTEGERS: Final = frozenset({"correct", "label_counts", "n_failed", "n_distinct"})

_COUNTS: Final = ("n", "correct", "loss_sums", "difference_squares", "n_failed", "n_distinct")
"""Fields of an `EvaluateReport`."""

_WEIGHT: Final = "weight"


class Vector(NamedTuple):
    """The integers of a result: 64 bits each, then 32 bits each, and the fields that they are."""

    fields: tuple[MaskedField, ...]
    wide: NDArray[np.uint64]
    narrow: NDArray[np.uint32]

    @property
    def n_bytes(self) -> int:
        return self.wide.nbytes + self.narrow.nbytes

    def to_bytes(self) -> bytes:
        return self.wide.astype("<u8").tobytes() + self.narrow.astype("<u4").tobytes()


def sizes(fields: Sequence[MaskedField]) -> tuple[int, int]:
    """Numbers of 64 and of 32 bits in a vector of ``fields``."""
    counts = {64: 0, 32: 0}
    for field in fields:
        counts[field.bits] += int(np.prod(field.shape, dtype=np.int64))
    return counts[64], counts[32]


def from_bytes(fields: tuple[MaskedField, ...], data: bytes) -> Vector:
    """The vector that `Vector.to_bytes` wrote. Raises `WireError` for another length."""
    n_wide, n_narrow = sizes(fields)
    if len(data) != 8 * n_wide + 4 * n_narrow:
        raise WireError(f"a masked result has {len(data)} bytes, expected {8 * n_wide + 4 * n_narrow}", field="data")
    wide = np.frombuffer(data, "<u8", n_wide).astype(np.uint64)
    return Vector(fields, wide, np.frombuffer(data, "<u4", n_narrow, 8 * n_wide).astype(np.uint32))


def of_result(result: Result, n_texts: int, use: SecureUse) -> Vector:
    """A round's result over ``n_texts`` rows. Raises `InputError` for one that is not a sum."""
    kind = type(result)
    if kind not in _SUMS and kind not in _MEANS:
        raise InputError(f"a {kind.__name__} cannot be added up securely: set secure = false", field="secure")
    share = min(1.0, use.most_rows / n_texts) if use.most_rows else 1.0
    weight = share * n_texts
    wide = {_WEIGHT: np.array(weight)}
    wide |= {name: share * _values(result, name) for name in _SUMS.get(kind, ())}
    if isinstance(result, SelectResult) and result.label_counts:  # of all rows, scored or not
        n_all = sum(result.label_counts)
        wide["label_counts"] = min(1.0, (use.most_counted or n_all) / max(n_all, 1)) * _values(result, "label_counts")
    wide |= {name: weight * _values(result, name) for name in _MEANS.get(kind, ()) if _given(result, name)}
    narrow = {name: share * _values(result, name) for name in _STATES.get(kind, ())}
    return _vector(wide, narrow, use)


def of_evaluation(report: EvaluateReport, use: SecureUse) -> Vector:
    """The counts of an evaluation."""
    return _vector({name: _values(report, name) for name in _COUNTS if _given(report, name)}, {}, use)


def result_of(total: Vector, kind: type[Result], purpose: FitPurpose | None, use: SecureUse) -> tuple[Result, int]:
    """The result, a ``kind`` of this ``purpose``, over all devices' rows, and their number, from the sum of vectors.

    Sums over rows are scaled to that whole number of rows. Raises `WireError` for other fields than those of ``kind``.
    """
    values = _arrays(total, use)
    weight = max(float(values.pop(_WEIGHT, np.zeros(()))), 1e-9)
    n_texts = max(round(weight), 1)
    fields: dict[str, Any] = {} if purpose is None else {"purpose": purpose}
    for name, found in values.items():
        scaled = found / weight * (1 if name in _MEANS.get(kind, ()) else n_texts)
        fields[name] = float(scaled) if name == "loss" else _whole(scaled) if name in _INTEGERS else Array.of(scaled)
    try:
        return kind(**fields), n_texts
    except TypeError as error:
        raise WireError(f"a masked result lacks fields: expected those of a {kind.__name__}", field="fields") from error


def evaluation_of(total: Vector, use: SecureUse, seconds: float) -> EvaluateReport:
    """The evaluation over all devices' rows."""
    values = _arrays(total, use)
    return EvaluateReport(
        n=max(round(float(values["n"])), 1),
        correct=_whole(values["correct"]),
        loss_sums=tuple(values["loss_sums"].tolist()),
        seconds=seconds,
        difference_squares=tuple(values["difference_squares"].tolist()),
        n_failed=_whole(values["n_failed"]) if "n_failed" in values else UNSET,
        n_distinct=_whole(values["n_distinct"]) if "n_distinct" in values else UNSET,
    )


def as_masked(vector: Vector) -> MaskedResult:
    """``vector`` as a message."""
    return MaskedResult(fields=vector.fields, data=vector.to_bytes())


def _given(message: Any, name: str) -> bool:
    return getattr(message, name) is not UNSET


def _values(message: Any, name: str) -> Floats:
    value = getattr(message, name)
    return value.numpy() if isinstance(value, Array) else np.array(value, dtype=np.float64)


def _vector(wide: Mapping[str, Floats], narrow: Mapping[str, Floats], use: SecureUse) -> Vector:
    fields = [MaskedField(name=name, shape=values.shape, bits=64) for name, values in wide.items()]
    fields += [MaskedField(name=name, shape=values.shape, bits=32) for name, values in narrow.items()]
    many = np.concatenate([values.ravel() for values in wide.values()])
    states = np.concatenate([values.ravel() for values in narrow.values()] or [np.zeros(0)])
    return Vector(tuple(fields), pack(many, len(use.peers)), pack_states(states, use.largest))


def _arrays(total: Vector, use: SecureUse) -> dict[str, Floats]:
    """The numbers of each field of a sum."""
    flat = {64: unpack(total.wide), 32: unpack_states(total.narrow, use.largest)}
    found = {}
    for field in total.fields:
        n = int(np.prod(field.shape, dtype=np.int64))
        found[field.name] = flat[field.bits][:n].reshape(field.shape)
        flat[field.bits] = flat[field.bits][n:]
    return found


def _whole(values: Floats) -> tuple[int, ...]:
    return tuple(np.rint(values).astype(int).tolist())
