"""Differential privacy of a device's results: clipped losses, Gaussian noise, and the accounting of ε.

A release is the noisy mean of the losses of k candidates over a secret sample S of a device's n training rows. Row i's
losses ℓ_i ∈ R^k, minus their mean, are clipped to Euclidean norm C:

    r = (Σ_{i∈S} clip_C(ℓ_i − mean ℓ_i) + N(0, (z·C)²·I_k)) / (q·n),    each row in S with probability q

The unit of privacy is a row: two sets of n rows are neighbours if one has an empty row, which contributes nothing, in
place of a row of the other (zero-out). The sum's Euclidean sensitivity is then C; n, q, z and C are public. This is the
subsampled Gaussian mechanism of DP-SGD (Abadi et al. 2016, arXiv 1607.00133) with losses in place of gradients; ε comes
from the Rényi accountant of ``dp-accounting`` (Mironov et al. 2019, arXiv 1908.10530).

Sample and noise are derived from a key that only the device knows and from the query: nobody else can subtract them,
and a repeated query has the same result, so it costs no further ε.
"""

from __future__ import annotations

import hmac
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedbpt.errors import InputError, MissingExtraError
from fedbpt.protocol.rounds import FitWork, LayersWork, MeansWork, RoundPlan, SelectWork
from fedbpt.protocol.specs import PrivacySpec

Floats: TypeAlias = NDArray[np.float64]
RowLosses: TypeAlias = Callable[[NDArray[np.intp]], Floats]
"""Maps row indices [n] to losses [k, n]."""


class Releases:
    """A device's noisy results of one query.

    Args:
        spec: clip and noise.
        key: the device's secret, from the operating system's entropy; never leaves the device.
        query: everything that determines the result.
    """

    def __init__(self, spec: PrivacySpec, key: bytes, query: str) -> None:
        self._spec = spec
        self._key = key
        self._query = query

    def mean(self, part: int, k: int, n_rows: int, size: int, losses: RowLosses) -> Floats:
        """Noisy mean losses [k], release ``part`` of the query, on a sample of ``size`` expected rows (0: all)."""
        rng = self._generator(part)
        rate = sampling_rate(n_rows, size)
        sample = np.flatnonzero(rng.random(n_rows) < rate)
        total = clipped(losses(sample), self._spec.clip).sum(axis=1) if len(sample) else np.zeros(k)
        noise = rng.normal(0.0, self._spec.noise_multiplier * self._spec.clip, k)
        return np.asarray((total + noise) / (rate * n_rows))

    def noisy(self, *sums: Floats, devices: int = 1) -> tuple[Floats, ...]:
        """``sums`` over rows, to which a row adds at most 1 in Euclidean norm, with the noise of a readout.

        ``devices``: how many devices' noise is enough together, where nobody sees their sums apart.
        """
        rng = self._generator(0)
        scale = self._spec.noise_of_readout / math.sqrt(devices)
        return tuple(np.asarray(each + rng.normal(0.0, scale, each.shape)) for each in sums)

    def _generator(self, part: int) -> np.random.Generator:
        seed = hmac.digest(self._key, f"{part}|{self._query}".encode(), "sha256")
        sequence = np.random.SeedSequence(int.from_bytes(seed, "little"), pool_size=8)
        return np.random.Generator(np.random.PCG64(sequence))


ORDERS = (*range(2, 65), 96, 128, 256, 512, 1024)
"""Rényi orders: integers only, whose sums are finite; for others the accountant's series may fail to converge."""


def clipped(losses: Floats, clip: float) -> Floats:
    """Centre each row's losses (a column of ``losses`` [k, n]) and clip them to Euclidean norm ``clip``.

    A row whose losses are not finite becomes zeros: it would show through any noise.
    """
    with np.errstate(all="ignore"):  # a warning, too, would tell of a row
        centred = losses - losses.mean(axis=0)
        norms = np.sqrt((centred**2).sum(axis=0))
        found = centred * (clip / np.maximum(norms, clip))
    return np.where(np.isfinite(found).all(axis=0), found, 0.0)


def sampling_rate(n_rows: int, size: int) -> float:
    """Probability that a row is in a sample of ``size`` expected rows (0: all)."""
    return min(1.0, size / n_rows) if size else 1.0


def check_private(plan: RoundPlan) -> None:
    """Raise `InputError` if a private plan requests results that cannot be released with noise.

    Or if a plan requests noisy sums without saying how noisy.
    """
    work = plan.work
    if isinstance(work, MeansWork) and (plan.privacy is None or (plan.secure and plan.secure.most_rows)):
        raise InputError(
            "noisy sums of states need their noise, of all rows alike: set [settings.privacy], expected most_rows 0",
            field="privacy",
        )
    by_label = isinstance(work, SelectWork) and work.by_label
    fits = isinstance(work, FitWork | LayersWork)
    if plan.privacy is not None and (fits or by_label or plan.objective.perturb > 0):
        raise InputError(
            "a private plan can request only losses of candidates or templates, and noisy sums of states: no other "
            "fit, no losses by label, no perturbed ratio",
            field="privacy",
        )


def require_accountant() -> None:
    """Raise `MissingExtraError` if the accountant's library is not installed."""
    epsilon(PrivacySpec(clip=1.0, noise_multiplier=1.0), [])


class Released(NamedTuple):
    """``times`` Gaussian releases, each of a sample of the rows with probability ``rate``.

    ``noise``: standard deviation over sensitivity.
    """

    noise: float
    rate: float
    times: int


def epsilon(spec: PrivacySpec, releases: Iterable[tuple[float, int]], readouts: int = 0) -> float:
    """Total ε at ``spec.delta`` of ``releases`` of losses, pairs (sampling rate, number), and of ``readouts``' sums.

    Raises:
        MissingExtraError: ``fedbpt[privacy]`` is not installed.
    """
    losses = [Released(spec.noise_multiplier, rate, count) for rate, count in releases]
    return total_epsilon([*losses, Released(spec.noise_of_readout, 1.0, readouts)], spec.delta)


def total_epsilon(releases: Iterable[Released], delta: float) -> float:
    """Total ε at ``delta`` of ``releases``. Raises as `epsilon`."""
    try:
        from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
        from dp_accounting.rdp import RdpAccountant
    except ImportError as error:
        raise MissingExtraError("accounting for privacy", "privacy") from error
    accountant = RdpAccountant(ORDERS, NeighboringRelation.REPLACE_SPECIAL)
    for release in releases:
        noise = GaussianDpEvent(release.noise)
        if release.times:
            accountant.compose(
                noise if release.rate == 1 else PoissonSampledDpEvent(release.rate, noise), release.times
            )
    found = float(accountant.get_epsilon(delta))
    return found if math.isfinite(found) else math.inf
