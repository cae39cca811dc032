"""Sizes that devices and coordinator agree on."""

from __future__ import annotations

from typing import Final

from fedbpt.secure.shamir import SHARE_BYTES

FEWEST: Final = 3
"""Devices of a sum: of two, each would know the other's result."""

USES: Final = 64
"""Sums of an epoch."""

SEALED_BYTES: Final = 2 * SHARE_BYTES + 16
"""Length of the shares of both secrets of a use, sealed: with a tag of 16 bytes."""

SKETCH_RANK: Final = 32
"""Most columns of a sketch of states: with as many rows a fold, over all devices, its sums are exact."""

MOST_SKETCH_BYTES: Final = 12 * 2**20
"""Most bytes of the sums of states in one message, whose body has at most 16 MiB."""


def sketch_rank(n_readers: int, n_folds: int, n_labels: int, n_embd: int) -> int:
    """Columns of the sketches that fit into a message, with 4 bytes a number; at least 4."""
    a_column = max(4 * n_readers * n_folds * n_embd, 1)
    return max(min(MOST_SKETCH_BYTES // a_column - n_labels - 1, SKETCH_RANK), 4)
