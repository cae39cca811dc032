"""Means over devices in which no single device decides: what lies far from the rest counts up to a bound.

Winsorised around the median (Huber 1981, Robust Statistics, 1.2). The bound is twice the deviation that all but a fifth
of the devices stay within: where devices differ, because their labels do, they count as they are; where most agree, the
others are held back. With fewer than 3 devices there is no majority, and these are plain means.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedbpt.aggregation.base import weighted_sum

Floats = NDArray[np.float64]

FEWEST: Final = 3
"""Fewest devices with a majority."""

LIARS: Final = 5
"""One device of so many may lie, and at least one."""

MOST_APART: Final = 2.0
"""Multiple of the others' deviations from the median up to which a value counts."""

LOUDEST: Final = 1.5
"""Multiple of the others' spreads of losses up to which a device's counts."""


def usual(sizes: Floats) -> Floats:
    """The largest of each column of ``sizes`` [K, n] without the largest fifth of the devices, at least one."""
    found: Floats = np.sort(sizes, axis=0)[len(sizes) - 1 - max(len(sizes) // LIARS, 1)]
    return found


def bounded(rows: Floats) -> Floats:
    """``rows`` [K, n] of K devices, each entry held near its column's median."""
    if len(rows) < FEWEST:
        return rows
    middle = np.median(rows, axis=0)
    most = MOST_APART * usual(np.abs(rows - middle))
    found: Floats = np.clip(rows, middle - most, middle + most)
    return found


def bounded_losses(losses: Floats, weights: Floats) -> Floats:
    """Mean [n] over devices of their ``losses`` [K, n] of n options; ``weights`` [K] sum to 1.

    What decides is by how much a device prefers one option to another, and that varies less from device to device than
    how hard its rows are. So `bounded` are the differences from the option that is best for the median device.
    """
    if len(losses) < FEWEST:
        return weighted_sum(weights, losses)
    best = int(np.median(losses, axis=0).argmin())
    level = weighted_sum(weights, bounded(losses[:, [best]]))
    return level + weighted_sum(weights, bounded(losses - losses[:, [best]]))


def levelled(losses: Floats) -> Floats:
    """``losses`` [K, n] of candidates, each row less its mean, and shrunk where its norm exceeds the usual ones."""
    centred: Floats = losses - losses.mean(axis=1, keepdims=True)
    if len(losses) < FEWEST:
        return centred
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    most = LOUDEST * float(usual(norms)[0])
    if most > 0:
        centred *= np.minimum(1.0, most / np.maximum(norms, 1e-300))
    return centred
