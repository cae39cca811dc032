"""Numbers as integers modulo 2**64 or 2**32: their sums are exact, in any order, and can be masked."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

FRACTION: Final = 24
"""Binary digits after the point of a 64-bit number: steps of 6e-8."""


def pack(values: NDArray[np.float64], n_devices: int) -> NDArray[np.uint64]:
    """``values`` as 64-bit integers, cut where a sum over ``n_devices`` might overflow.

    Honest values are far smaller. Larger ones raise no error, which would tell something about one device's values.
    """
    most = 2.0 ** (62 - FRACTION) / n_devices
    values = np.clip(np.nan_to_num(values), -most, most)
    return np.rint(values * 2.0**FRACTION).astype(np.int64).view(np.uint64)


def unpack(total: NDArray[np.uint64]) -> NDArray[np.float64]:
    """The numbers that a sum of `pack` stands for."""
    return total.view(np.int64).astype(np.float64) / 2.0**FRACTION


def pack_states(values: NDArray[np.float64], largest: float) -> NDArray[np.uint32]:
    """``values``, of which no sum over devices is beyond ``largest``, as 32-bit integers; cut like `pack`."""
    scaled = np.clip(np.rint(np.nan_to_num(values) * _state_scale(largest)), 1 - 2**31, 2**31 - 1)
    return scaled.astype(np.int32).view(np.uint32)


def unpack_states(total: NDArray[np.uint32], largest: float) -> NDArray[np.float64]:
    """The numbers that a sum of `pack_states` stands for."""
    return total.view(np.int32).astype(np.float64) / _state_scale(largest)


def _state_scale(largest: float) -> float:
    return 2.0 ** (30 - math.ceil(math.log2(largest)))
