"""`Draw`: which devices a round of a run asks first, by a hash that each device can compute for itself.

The value of a device in a round follows from the run's name, its seed, the round and the device's name only. A round
asks the devices of the lowest values that are there, and tells each the share of all values, from 0 up, that it is
drawn from. A device whose value is above that share was not drawn.
"""

from __future__ import annotations

import hashlib
from typing import Final

from fedbpt.protocol.specs import Name

_PURPOSE: Final = b"fedbpt draw 1"


class Draw:
    """The draw of ``round`` of ``run``, whose seed is ``seed``."""

    def __init__(self, run: Name, seed: int, round: int) -> None:
        # Names have no zero byte, so no two draws hash the same text.
        self._hash = hashlib.sha256(b"\0".join([_PURPOSE, run.encode(), b"%d" % seed, b"%d" % round, b""]))

    def value(self, device: Name) -> float:
        """The value of ``device``, uniform in [0, 1): the first 53 bits of the SHA-256."""
        hashed = self._hash.copy()
        hashed.update(device.encode())
        return (int.from_bytes(hashed.digest()[:8], "big") >> 11) / 2.0**53
