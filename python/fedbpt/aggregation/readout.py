"""`ReadoutFit`: multinomial logistic regression over devices by exact pooled gradients (`fedbpt.objective.readout`).

The words' logits x are centred by μ and scaled by r, pooled moments (one exchange); then `Lbfgs` minimises

    mean cross-entropy + ρ/(2n)·‖W‖²,    W the weights on (1, 3·(x − μ)/r),    n rows on all devices

from W = 0: the model's own label words, with the given bias. An exchange is one evaluation of the loss and its
gradient; devices see only V, into which μ and r are folded. Several templates have separate readouts; the mean of their
objectives is minimised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedbpt.aggregation.base import accepted, devices_of, weights_of
from fedbpt.aggregation.lbfgs import Lbfgs
from fedbpt.aggregation.robust import Robust, centre, reports_needed, rule_of_fits
from fedbpt.errors import InputError
from fedbpt.protocol.rounds import FitPurpose, FitResult, FitWork, RoundReport
from fedbpt.protocol.specs import Array, Readout, Template

Floats = NDArray[np.float64]

RIDGE = 2.5
"""ρ. Chosen on development rows of AG News and SST-2, see docs/algorithm.md."""

EXCHANGES = 14
"""Most evaluations of the gradient."""

_SPREAD = 3.0  # root mean square norm of the scaled logits
_ROUNDING = 1e-5  # relative, of the moments, which are sent as float32
_MIN_SCALE = 1e-3  # logits that vary less carry no information


class ReadoutFit:
    """One fit, see `Fit`.

    Args:
        purpose: sent with the work; devices repeat it.
        latent: [d], the prompt.
        n_words: of the readout; 0 fits only a bias.
        n_labels: of the task.
        bias: [n_labels] to start from; None: zeros.
        max_rows: most training rows used on a device.
        others: templates whose readouts are fitted too, without a prompt.
        robust: ``trimmed-mean``, or with any other rule the ``median``, replaces the devices' mean of each coordinate
            (Yin et al. 2018, arXiv 1803.01498); the gradient is then not exact.
        byzantine: number of Byzantine devices tolerated; unused without a robust rule.
    """

    def __init__(
        self,
        purpose: FitPurpose,
        latent: Floats,
        n_words: int,
        n_labels: int,
        bias: Floats | None = None,
        max_rows: int = 512,
        others: tuple[Template, ...] = (),
        robust: Robust = "none",
        byzantine: int = 1,
    ) -> None:
        self._robust = rule_of_fits(robust)
        self._byzantine = byzantine
        self.min_reports = reports_needed(self._robust, byzantine)
        self.purpose: FitPurpose = purpose
        self._latent = np.array(latent)
        self._others = others
        self._shape = (1 + len(others), 1 + n_words, n_labels)
        self._bias = np.zeros((len(others) + 1, n_labels))
        if bias is not None:
            self._bias[0] = bias
        self._max_rows = max_rows
        self._centre = np.zeros((*self._shape[:1], n_words))
        self._scale = np.ones(self._shape[0])
        self._centred = n_words == 0
        self._search = Lbfgs(self._shape)  # for W
        self._devices: tuple[str, ...] = ()
        self._exchanges = 0
        self.done = False

    @property
    def readout(self) -> Readout:
        """The best readout so far."""
        return self._readout(self._search.best)

    @property
    def loss(self) -> float:
        """Objective of `readout`, nats."""
        return self._search.value

    def work(self) -> FitWork:
        """What every device does next."""
        return FitWork(
            purpose=self.purpose,
            latent=Array.of(self._latent),
            n_words=self._shape[1] - 1,
            readout=self._readout(self._search.point) if self._centred else None,
            centre=Array.of(self._centre.ravel(), "<f4") if self._centre.size and self._centred else None,
            others=self._others,
            max_rows=self._max_rows,
        )

    def update(self, reports: Sequence[RoundReport]) -> None:
        """Close an exchange. Raises `InputError`, and changes nothing, for reports that do not fit."""
        pairs = accepted(reports, FitResult, self.min_reports)
        shape = self._shape if self._centred else self._shape[:2]
        for report, result in pairs:
            if result.means.shape != shape:
                got, expected = list(result.means.shape), list(shape)
                raise InputError(
                    f"device {report.device} sent means of shape {got}, expected {expected}", field="means"
                )
        weights = weights_of(pairs)
        means = self._middle(weights, np.stack([result.means.numpy().ravel() for _, result in pairs]))
        if not self._centred:
            means = means.reshape(shape)
            self._centre = means[:, :-1].astype(np.float32).astype(np.float64)  # rounded as devices get it
            square = means[:, -1]
            variance = square - (self._centre**2).sum(axis=1)
            # The variance of words that never change is the rounding of the moments: do not scale it up.
            scale = np.sqrt(np.maximum(variance, _ROUNDING * square))
            self._scale = np.where(scale > 0, np.maximum(scale, _MIN_SCALE), 1.0)
            self._centred = True
            return
        loss = float(self._middle(weights, np.array([[result.loss] for _, result in pairs]))[0])
        n_rows = sum(report.n_texts for report, _ in pairs)
        self._exchanges += 1
        devices = tuple(name for report, _ in pairs for name in devices_of(report))
        if devices != self._devices:
            # A loss on other rows: earlier ones cannot be compared with it.
            self._devices = devices
            self._search.forget()
        self._search.learn(*self._objective(loss, means.reshape(self._shape), RIDGE / n_rows))
        self.done = self._search.done or self._exchanges >= EXCHANGES

    def _middle(self, weights: Floats, rows: Floats) -> Floats:
        return centre(rows, weights, self._robust, self._byzantine)

    def digest(self) -> str:
        """sha256 (hex) of everything that decides what comes next."""
        digest = hashlib.sha256(
            f"{self.purpose}|{self._shape}|{self._search.length.hex()}|{self._exchanges}|{self._devices}".encode()
        )
        points = (self._latent, self._bias, self._centre, *self._search.state())
        for array in (*points, self._scale, np.array([self._search.value])):
            digest.update(np.ascontiguousarray(array, dtype="<f8").tobytes())
        return digest.hexdigest()

    def _objective(self, loss: float, by_v: Floats, ridge: float) -> tuple[float, Floats]:
        """The objective, and its gradient by W, at the point of the last `work`."""
        point = self._search.point
        gradient: Floats = by_v.copy()
        gradient[:, 1:] *= (_SPREAD / self._scale)[:, None, None]  # centred on the devices
        n_templates = len(gradient)
        return loss + ridge / 2 * float((point**2).sum()) / n_templates, (gradient + ridge * point) / n_templates

    def _readout(self, point: Floats) -> Readout:
        """V of W: the bias, μ and r folded in."""
        weights: Floats = point.copy()
        weights[:, 1:] *= (_SPREAD / self._scale)[:, None, None]
        weights[:, 0] += self._bias - np.einsum("tw,twk->tk", self._centre, weights[:, 1:])
        own, *others = (Array.of(of_template, "<f4") for of_template in weights)
        return Readout(weights=own, others=tuple(others))

    def __repr__(self) -> str:
        n_words = self._shape[1] - 1
        return f"ReadoutFit({self.purpose}, {n_words} words, exchange {self._exchanges}, {self._search.value:.4f} nats)"
