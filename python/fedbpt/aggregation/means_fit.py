"""`MeansFit`: fits a `LayerReadout` over devices with differential privacy, in two exchanges.

1. Devices read public texts, from which follows the frame that rows' states are projected and clipped in.
2. Each device sends the sums of its rows' states by label, clipped and with noise, once (`fedbpt.engine.noisy_means`).
   The sum over devices gives the readout; nothing else is asked of rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedbpt.aggregation.base import accepted, devices_of
from fedbpt.engine.noisy_means import Frame, NoisySums, classifier, n_components, public_frame
from fedbpt.errors import InputError
from fedbpt.protocol import codec
from fedbpt.protocol.rounds import (
    FitPurpose,
    MeansResult,
    MeansWork,
    PublicResult,
    PublicWork,
    Reading,
    RoundReport,
)
from fedbpt.protocol.specs import Array, LayerReadout
from fedbpt.secure.sizes import threshold_of

Floats = NDArray[np.float64]

N_PUBLIC: Final = 192
"""Public texts."""

FEWEST_PUBLIC: Final = 64
"""Public texts that are read of the largest models."""

MOST_BYTES: Final = 11 * 2**20
"""Most bytes of a projection, or of public texts' states, in one message."""


class MeansFit:
    """One fit, see `Fit`.

    Args:
        purpose: sent with the work; devices repeat it.
        reading: rows, templates and layers, without a prompt.
        n_labels: of the task.
        noise: standard deviation of the noise of each device's sums.
        secure: of their sum, to which each device adds a part.
    """

    min_reports = 1

    def __init__(
        self, purpose: FitPurpose, reading: Reading, n_labels: int, noise: float, secure: bool = False
    ) -> None:
        self.purpose: FitPurpose = purpose
        self.reading = reading
        """What this fit reads."""
        self.done = False
        self._n_labels = n_labels
        self._noise = noise
        self._secure = secure
        self._work: PublicWork | MeansWork = PublicWork(purpose=purpose, reading=reading, n_texts=n_public(reading))
        self._frame: Frame | None = None
        self._readout: LayerReadout | None = None
        self._digest = hashlib.sha256(repr((purpose, reading, n_labels, noise, secure)).encode()).hexdigest()

    @property
    def readout(self) -> LayerReadout:
        """The readout; before the last exchange, one that knows nothing."""
        if self._readout is not None:
            return self._readout
        n_embd = max(self.reading.n_embd, 1)
        return LayerReadout(
            layers=self.reading.layers,
            weights=Array.of(np.zeros((1, len(self.reading.layers), n_embd, self._n_labels)), "<f2"),
            word_scales=Array.of(np.zeros(1), "<f4"),
            bias=Array.of(np.zeros(self._n_labels), "<f4"),
        )

    def work(self) -> PublicWork | MeansWork:
        """What every device does in the next exchange."""
        return self._work

    def update(self, reports: Sequence[RoundReport]) -> None:
        """Close an exchange. Raises `InputError`, and changes nothing, for reports that do not fit."""
        if isinstance(self._work, PublicWork):
            self._take_public(accepted(reports, PublicResult, self.min_reports))
        else:
            self._take_means(accepted(reports, MeansResult, self.min_reports))
        digest = hashlib.sha256(self._digest.encode())
        for report in sorted(reports, key=lambda report: report.device):
            digest.update(f"|{report.device}|{report.n_texts}|".encode() + codec.encode(report.result))
        self._digest = digest.hexdigest()

    def digest(self) -> str:
        """sha256 (hex) of everything that decides what comes next: all results so far."""
        return self._digest

    def _take_public(self, pairs: Sequence[tuple[RoundReport, PublicResult]]) -> None:
        """Devices have the same model, so the first one's results are everybody's."""
        result = pairs[0][1]
        reading = self.reading
        centres = result.centres.numpy()
        states = result.states.numpy() + centres[:, None]  # [n_readers, n_texts, n_embd]
        n_texts = states.shape[1]
        expected = (n_texts, reading.n_word_views, self._n_labels if reading.n_word_views else 0)
        if states.shape[0] != reading.n_readers or result.words.shape != expected:
            raise InputError(
                f"device {pairs[0][0].device} sent public texts of other shapes: update it", field="states"
            )
        n_rows = sum(min(report.n_texts, reading.max_rows or report.n_texts) for report, _ in pairs)
        p = n_components(self._noise, 1 if self._secure else len(pairs), n_rows, self._n_labels)
        n_dims = reading.n_readers * centres.shape[1]
        p = min(p, n_texts // 4, max(MOST_BYTES // (2 * n_dims), 1))
        found = public_frame(np.moveaxis(states, 0, 1).reshape(n_texts, -1), result.words.numpy(), p)
        centre = Array.of(found.centre.reshape(centres.shape), "<f4")
        projection = Array.of(found.projection.reshape(*centres.shape, -1), "<f2")
        word_centres = Array.of(found.word_centres, "<f4")
        self._frame = found._replace(  # as devices have it
            centre=centre.numpy().ravel(),
            projection=projection.numpy().reshape(n_dims, -1),
            word_centres=word_centres.numpy(),
        )
        self._work = MeansWork(
            purpose=self.purpose,
            reading=reading,
            centre=centre,
            projection=projection,
            word_centres=word_centres,
            word_clip=found.word_clip,
        )

    def _take_means(self, pairs: Sequence[tuple[RoundReport, MeansResult]]) -> None:
        frame = self._frame
        if frame is None:
            raise InputError("noisy sums came before the public texts: begin the fit anew", field="result")
        p = frame.projection.shape[1]
        for report, result in pairs:
            if (result.label_sums.shape, result.state_sums.shape) != ((self._n_labels,), (self._n_labels, p)):
                raise InputError(f"device {report.device} sent sums of other shapes: update it", field="state_sums")
        total = NoisySums(
            np.sum([result.label_sums.numpy() for _, result in pairs], axis=0),
            np.sum([result.state_sums.numpy() for _, result in pairs], axis=0),
            np.sum([result.word_sums.numpy() for _, result in pairs], axis=0),
        )
        n_rows = sum(report.n_texts for report, _ in pairs)
        found = classifier(total, frame, self._noise * math.sqrt(self._n_parts(pairs)), n_rows)
        reading = self.reading
        scales = np.zeros(reading.n_views)
        scales[: reading.n_word_views] = found.word_scale
        weights = found.weights.reshape(reading.n_views, len(reading.layers), -1, self._n_labels)
        largest = np.abs(weights).max(initial=1e-30)
        softer = min(1.0, 6e4 / largest)  # the largest number in half precision
        self._readout = LayerReadout(
            layers=reading.layers,
            weights=Array.of(softer * weights, "<f2"),
            word_scales=Array.of(softer * scales, "<f4"),
            bias=Array.of(softer * found.bias, "<f4"),
            others=reading.templates,
        )
        self.done = True

    def _n_parts(self, pairs: Sequence[tuple[RoundReport, MeansResult]]) -> float:
        """Variance of the noise in the sum of all reports, as a multiple of one device's."""
        if not self._secure:
            return len(pairs)
        n_devices = sum(len(devices_of(report)) for report, _ in pairs)
        return n_devices / threshold_of(n_devices)  # or a little less, where some dropped out

    def __repr__(self) -> str:
        stage = "done" if self.done else type(self._work).__name__
        return f"MeansFit({self.purpose}, {self.reading.n_readers} readers, noise {self._noise:g}, {stage})"


def n_public(reading: Reading) -> int:
    """Public texts that are read: fewer for models with long states, which must fit into a message."""
    most = 2 * MOST_BYTES // max(reading.n_readers * max(reading.n_embd, 1), 1)
    return max(min(N_PUBLIC, most), FEWEST_PUBLIC)
