"""Secret sharing (Shamir 1979, CACM 22): any ``threshold`` of the shares give the secret, fewer say nothing of it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Final

from fedbpt.errors import WireError

PRIME: Final = 2**256 + 297
"""The smallest prime over 2**256."""

SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 33


def split(secret: bytes, n_shares: int, threshold: int) -> list[bytes]:
    """Shares of a secret of 32 bytes: the one of place i, from 0, is the value of a random polynomial at i + 1."""
    coefficients = [int.from_bytes(secret, "little"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = []
    for point in range(1, n_shares + 1):
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * point + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "little"))
    return shares


def combine(places: Sequence[int], shares: Sequence[bytes]) -> bytes:
    """The secret of which these are ``threshold`` shares, of different places.

    Raises `WireError` where they cannot be shares of one secret.
    """
    points = [place + 1 for place in places]
    values = [int.from_bytes(share, "little") for share in shares]
    secret = 0
    for point, value in zip(points, values, strict=True):
        above, below = 1, 1
        for other in points:
            if other != point:
                above = above * other % PRIME
                below = below * (other - point) % PRIME
        secret = (secret + value * above * pow(below, -1, PRIME)) % PRIME
    if secret >= 2 ** (8 * SECRET_BYTES):
        raise WireError("shares do not belong together: expected those of one secret", field="shares")
    return secret.to_bytes(SECRET_BYTES, "little")
