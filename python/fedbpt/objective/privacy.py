"""Differential privacy of what a device sends: clipped losses, Gaussian noise, and what they cost in ε.

A release is the noisy mean of the losses of k candidates over a secret sample S of a device's n training rows. Row i's
losses ℓ_i ∈ R^k, less their mean, are clipped to Euclidean norm C:

    r = (Σ_{i∈S} clip_C(ℓ_i − mean ℓ_i) + N(0, (z·C)²·I_k)) / (q·n),    each row in S with probability q

The unit of privacy is a row: neighbours are two sets of n rows of which one has an empty row, that counts nothing, in
some row's place (zero-out). The sum's Euclidean sensitivity is then C; n, q, z and C are public. This is the subsampled
Gaussian mechanism of DP-SGD (Abadi et al. 2016, arXiv 1607.00133) with losses in the place of gradients; ε comes from
the Rényi accountant of ``dp-accounting`` (Mironov et al. 2019, arXiv 1908.10530).

Sample and noise come from a key that the device alone has and from what was asked: neither can be subtracted, and the
same question, asked again, has the same answer and so costs nothing more.
"""

from __future__ import annotations

import hmac
import math
from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedbpt.errors import InputError, MissingExtraError
from fedbpt.protocol.rounds import FitWork, RoundPlan, SelectWork
from fedbpt.protocol.specs import PrivacySpec

Floats: TypeAlias = NDArray[np.float64]
RowLosses: TypeAlias = Callable[[NDArray[np.intp]], Floats]
"""Row indices [n] to losses [k, n]."""


class Releases:
    """A device's noisy answers to one question.

    Args:
        spec: clip and noise.
        key: the device's own, from the operating system's entropy; it leaves the device never.
        question: what was asked, all of it.
    """

    def __init__(self, spec: PrivacySpec, key: bytes, question: str) -> None:
        self._spec = spec
        self._key = key
        self._question = question

    def mean(self, part: int, k: int, n_rows: int, size: int, losses: RowLosses) -> Floats:
        """Release ``part`` of the answer [k], of ``n_rows`` rows, ``size`` of them expected (0: all)."""
        rng = self._generator(part)
        rate = sampling_rate(n_rows, size)
        sample = np.flatnonzero(rng.random(n_rows) < rate)
        total = clipped(losses(sample), self._spec.clip).sum(axis=1) if len(sample) else np.zeros(k)
        noise = rng.normal(0.0, self._spec.noise_multiplier * self._spec.clip, k)
        return np.asarray((total + noise) / (rate * n_rows))

    def _generator(self, part: int) -> np.random.Generator:
        seed = hmac.digest(self._key, f"{part}|{self._question}".encode(), "sha256")
        sequence = np.random.SeedSequence(int.from_bytes(seed, "little"), pool_size=8)
        return np.random.Generator(np.random.PCG64(sequence))


ORDERS = (*range(2, 65), 96, 128, 256, 512, 1024)
"""Rényi orders: whole ones, whose sums are finite; between them the accountant's series may fail to converge."""


def clipped(losses: Floats, clip: float) -> Floats:
    """Each row's losses (a column of ``losses`` [k, n]) less their mean, of Euclidean norm ``clip`` at most."""
    centred = losses - losses.mean(axis=0)
    norms = np.sqrt((centred**2).sum(axis=0))
    return np.asarray(centred * (clip / np.maximum(norms, clip)))


def sampling_rate(n_rows: int, size: int) -> float:
    """The probability of a row to be in a sample of ``size`` expected rows; 0: all."""
    return min(1.0, size / n_rows) if size else 1.0


def check_private(plan: RoundPlan) -> None:
    """Raises `InputError` for a private plan that asks for what gets no noise."""
    by_label = isinstance(plan.work, SelectWork) and plan.work.by_label
    if plan.privacy is not None and (isinstance(plan.work, FitWork) or by_label or plan.objective.perturb > 0):
        raise InputError(
            "a private plan may ask for losses of candidates or templates alone: no fit, no labels, no perturbed ratio"
        )


def require_accountant() -> None:
    """Raises `MissingExtraError` where the accountant's library is not installed."""
    epsilon(PrivacySpec(clip=1.0, noise_multiplier=1.0), [])


def epsilon(spec: PrivacySpec, releases: Iterable[tuple[float, int]]) -> float:
    """ε at ``spec.delta`` of all ``releases`` together: (sampling rate, how many of it).

    Raises:
        MissingExtraError: without ``fedbpt[privacy]``.
    """
    try:
        from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
        from dp_accounting.rdp import RdpAccountant
    except ImportError as error:
        raise MissingExtraError("accounting for privacy", "privacy") from error
    accountant = RdpAccountant(ORDERS, NeighboringRelation.REPLACE_SPECIAL)
    noise = GaussianDpEvent(spec.noise_multiplier)
    for rate, count in releases:
        if count:
            accountant.compose(noise if rate == 1 else PoissonSampledDpEvent(rate, noise), count)
    found = float(accountant.get_epsilon(spec.delta))
    return found if math.isfinite(found) else math.inf
