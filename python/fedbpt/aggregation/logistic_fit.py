"""`LogisticFit`: fits a `LayerReadout` over devices by gradients (`fedbpt.objective.logistic`), not by sums.

Multinomial logistic regression on the states of one layer under several templates, side by side, and on the label
words' log-probabilities at a scale for each template. Devices send means and variances of their rows' states
once, and then the gradient at a point in each exchange: that says less of a row than the sums of `LayerFit`, and a
median over devices can stand in for their mean. It reads a little less well, and sends more bytes.

The states are centred and scaled by pooled moments, so that all of them together have norm 3; then `Lbfgs` minimises

    mean cross-entropy + ρ/(2n)·(‖W‖² + ‖c‖²),    W the weights, c the scales, n rows on all devices.

With ``judged``, a second point is fitted in the same exchanges without each device's fold 0, on which a run compares
what it might ship.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedbpt.aggregation.base import accepted, devices_of, weights_of
from fedbpt.aggregation.lbfgs import Lbfgs
from fedbpt.aggregation.robust import Robust, centre, reports_needed, rule_of_fits
from fedbpt.errors import InputError
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import (
    N_FOLDS,
    FitPurpose,
    LogisticResult,
    LogisticWork,
    MomentsResult,
    MomentsWork,
    Reading,
    RoundReport,
)
from fedbpt.protocol.specs import Array, LayerReadout

Floats = NDArray[np.float64]

RIDGE: Final = 1.0
"""ρ."""

EXCHANGES: Final = 14
"""Most evaluations of the gradient."""

MOST_WEIGHTS_BYTES: Final = 11 * 2**20
"""Most bytes of the weights in one message, whose body has at most 16 MiB."""

_SPREAD: Final = 3.0  # root mean square norm of the scaled states
_WORD_SPREAD: Final = 0.3  # root mean square of a label word's scaled log-probability
_SMALLEST_VARIANCE: Final = 1e-3  # of a dimension, as a share of the mean of its reader's


class LogisticFit:
    """One fit, see `Fit`.

    Args:
        purpose: sent with the work; devices repeat it.
        reading: rows, templates and layers.
        n_labels: of the task.
        judged: fit a second point without the rows that judge.
        robust: ``trimmed-mean``, or with any other rule the ``median``, replaces the devices' mean of each coordinate
            (Yin et al. 2018, arXiv 1803.01498); the gradient is then not exact.
        byzantine: number of Byzantine devices tolerated; unused without a robust rule.
    """

    def __init__(
        self,
        purpose: FitPurpose,
        reading: Reading,
        n_labels: int,
        judged: bool = True,
        robust: Robust = "none",
        byzantine: int = 1,
    ) -> None:
        self._robust = rule_of_fits(robust)
        self._byzantine = byzantine
        self.min_reports = reports_needed(self._robust, byzantine)
        self.purpose: FitPurpose = purpose
        self.reading = reading
        """What this fit reads."""
        self.done = False
        self._n_labels = n_labels
        self._n_points = 1 + judged
        self._searches: tuple[Lbfgs, ...] = ()  # after the moments; for [W, c, bias], flat
        self._centre: Floats = np.zeros(0)
        self._scale: Floats = np.zeros(0)  # of states [n_views, n_layers, n_embd]
        self._word_centre: Floats = np.zeros(0)
        self._word_scale: Floats = np.zeros(0)  # [n_word_views]
        self._exchanges = 0
        self._devices: tuple[str, ...] = ()
        self._digest = repr((purpose, reading, n_labels, judged, robust, byzantine))

    @property
    def readout(self) -> LayerReadout:
        """The best readout so far, fitted to all rows."""
        return self._readout(self._searches[0].best)

    @property
    def held_readout(self) -> LayerReadout | None:
        """The same, fitted without the fold that only judges; None: not fitted."""
        return self._readout(self._searches[1].best) if self._n_points > 1 else None

    @property
    def loss(self) -> float:
        """Objective of `readout`, nats."""
        return self._searches[0].value

    def work(self) -> MomentsWork | LogisticWork:
        """What every device does in the next exchange."""
        if not self._searches:
            return MomentsWork(purpose=self.purpose, reading=self.reading)
        parts = [self._parts(search.point) for search in self._searches]
        weights, scales, bias = (np.stack(each) for each in zip(*parts, strict=True))
        return LogisticWork(
            purpose=self.purpose,
            reading=self.reading,
            centre=Array.of(self._centre, "<f4"),
            word_centre=Array.of(self._word_centre, "<f4"),
            weights=Array.of(weights * self._scale[..., None], "<f2"),
            word_scales=Array.of(scales * self._word_scale, "<f4"),
            bias=Array.of(bias, "<f4"),
        )

    def update(self, reports: Sequence[RoundReport]) -> None:
        """Close an exchange. Raises `InputError`, and changes nothing, for reports that do not fit."""
        if self._searches:
            self._learn(reports)
        else:
            self._standardise(reports)
        digest = hashlib.sha256(self._digest.encode())
        for report in sorted(reports, key=lambda report: report.device):
            digest.update(f"|{report.device}|{report.n_texts}|".encode() + codec.encode(report.result))
        self._digest = digest.hexdigest()

    def digest(self) -> str:
        """sha256 (hex) of everything that decides what comes next: all results so far."""
        return hashlib.sha256(self._digest.encode()).hexdigest()

    # --- the exchanges -------------------------------------------------------------------------------------------

    def _standardise(self, reports: Sequence[RoundReport]) -> None:
        pairs = accepted(reports, MomentsResult, self.min_reports)
        shapes = moments_shapes(self.reading, self._n_labels, max(pairs[0][1].means.shape[-1:], default=0))
        for report, result in pairs:
            for field, expected in shapes.items():
                _check_shape(report, field, getattr(result, field).shape, expected)
        shares = weights_of(pairs)
        middle = {
            field: self._middle(shares, np.stack([getattr(result, field).numpy().ravel() for _, result in pairs]))
            for field in shapes
        }
        self._centre = _as_sent(middle["means"].reshape(shapes["means"]))
        variance = np.maximum(middle["squares"].reshape(shapes["means"]) - self._centre**2, 0.0)
        variance += _SMALLEST_VARIANCE * variance.mean(axis=2, keepdims=True) + 1e-12
        self._scale = _SPREAD / np.sqrt(variance * variance.size)
        self._word_centre = _as_sent(middle["word_means"].reshape(shapes["word_means"]))
        self._word_scale = _WORD_SPREAD / np.sqrt(middle["word_squares"] + 1e-12)
        size = self._centre.size * self._n_labels + len(self._word_scale) + self._n_labels
        self._searches = tuple(Lbfgs((size,)) for _ in range(self._n_points))

    def _learn(self, reports: Sequence[RoundReport]) -> None:
        pairs = accepted(reports, LogisticResult, self.min_reports)
        shapes = gradient_shapes(self.work())
        for report, result in pairs:
            for field, expected in shapes.items():
                _check_shape(report, field, getattr(result, field).shape, expected)
        shares = weights_of(pairs)
        middle = [
            self._middle(shares, np.stack([getattr(result, field).numpy().ravel() for _, result in pairs])).reshape(
                shapes[field]
            )
            for field in ("losses", "by_weights", "by_word_scales", "by_bias")
        ]
        losses, by_weights, by_scales, by_bias = middle
        n_rows = sum(report.n_texts for report, _ in pairs)
        self._exchanges += 1
        devices = tuple(name for report, _ in pairs for name in devices_of(report))
        if self._devices and devices != self._devices:
            for search in self._searches:
                search.forget()  # a loss on other rows: earlier ones cannot be compared with it
        self._devices = devices
        for point, search in enumerate(self._searches):
            if search.done:
                continue
            gradient = np.concatenate(
                [
                    (by_weights[point] * self._scale[..., None]).ravel(),
                    by_scales[point] * self._word_scale,
                    by_bias[point],
                ]
            )
            ridge = RIDGE / max(n_rows * (1.0 if point == 0 else 1 - 1 / N_FOLDS), 1.0)
            at = search.point.copy()
            at[-self._n_labels :] = 0.0  # the bias has no penalty
            search.learn(float(losses[point]) + ridge / 2 * float((at**2).sum()), gradient + ridge * at)
        self.done = all(search.done for search in self._searches) or self._exchanges >= EXCHANGES
        if self.done:
            for search in self._searches:
                search.end()

    def _middle(self, weights: Floats, rows: Floats) -> Floats:
        return centre(rows, weights, self._robust, self._byzantine)

    def _parts(self, point: Floats) -> tuple[Floats, Floats, Floats]:
        """W [n_views, n_layers, n_embd, n_labels], c [n_word_views] and bias [n_labels] of a flat point."""
        n_states = self._centre.size * self._n_labels
        weights, scales, bias = np.split(point, [n_states, len(point) - self._n_labels])
        return weights.reshape(*self._centre.shape, self._n_labels), scales, bias

    def _readout(self, point: Floats) -> LayerReadout:
        """The moments folded in."""
        reading = self.reading
        weights, scales, bias = self._parts(point)
        sent = Array.of(weights * self._scale[..., None], "<f2")
        word_scales = np.zeros(reading.n_views)
        word_scales[: reading.n_word_views] = scales * self._word_scale
        bias = bias - np.einsum("vle,vlek->k", self._centre, sent.numpy())
        if reading.n_word_views:
            bias -= word_scales[: reading.n_word_views] @ self._word_centre
        return LayerReadout(
            layers=reading.layers,
            weights=sent,
            word_scales=Array.of(word_scales, "<f4"),
            bias=Array.of(bias, "<f4"),
            others=reading.templates,
        )

    def __repr__(self) -> str:
        stage = "done" if self.done else f"exchange {self._exchanges}"
        return f"LogisticFit({self.purpose}, {self.reading.n_readers} readers, {stage})"


def max_views(n_labels: int, n_embd: int) -> int:
    """Templates of one layer whose weights at two points fit into a message; at least 1. ``n_embd`` 0: unknown."""
    return max(MOST_WEIGHTS_BYTES // max(2 * 2 * n_embd * n_labels, 1), 1)


def moments_shapes(reading: Reading, n_labels: int, n_embd: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the fields of `MomentsResult`."""
    states = reading.n_views, len(reading.layers), n_embd
    words = reading.n_word_views, n_labels if reading.n_word_views else 0
    return {"means": states, "squares": states, "word_means": words, "word_squares": words[:1]}


def gradient_shapes(work: MomentsWork | LogisticWork) -> dict[str, tuple[int, ...]]:
    """Shapes of the fields of `LogisticResult`."""
    if isinstance(work, MomentsWork):
        raise InputError("moments have no gradient: expected LogisticWork", field="work")
    return {
        "losses": work.bias.shape[:1],
        "by_weights": work.weights.shape,
        "by_word_scales": work.word_scales.shape,
        "by_bias": work.bias.shape,
    }


def _check_shape(report: RoundReport, field: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if got != expected:
        raise InputError(
            f"device {report.device} sent {field} of shape {list(got)}, expected {list(expected)}", field=field
        )


def _as_sent(values: Floats) -> Floats:
    """Rounded as devices get it."""
    rounded: Floats = values.astype(np.float32).astype(np.float64)
    return rounded
