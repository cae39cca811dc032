"""Bytes that secure aggregation costs a device beside the masked results, for `fedbpt.coordinator.costs.estimate`."""

from __future__ import annotations

import math
from typing import Final

from fedbpt.secure.shamir import SECRET_BYTES, SHARE_BYTES
from fedbpt.secure.sizes import SEALED_BYTES, USES

_NAME: Final = 20  # a device's name, and the length of a field
_SIGNED: Final = 200  # identity, X25519 key and signature


def secure_bytes(n_devices: int, n_sums: int, plan_bytes: int, report_bytes: int) -> tuple[int, int]:
    """Bytes (up, down) of the exchanges of keys and shares for ``n_sums`` sums over ``n_devices``.

    ``plan_bytes``, ``report_bytes``: of a message of these exchanges without keys and shares.
    """
    epochs = math.ceil(n_sums / USES)
    keys = _SIGNED + 2 * SECRET_BYTES * USES
    up = epochs * (2 * report_bytes + keys + n_devices * USES * SEALED_BYTES)
    down = epochs * (2 * plan_bytes + n_devices * (keys + _NAME))
    up += n_sums * (report_bytes + n_devices * (SHARE_BYTES + 2))
    down += n_sums * (plan_bytes + n_devices * (SEALED_BYTES + 2 * _NAME))
    return up, down
