"""Sizes that devices and coordinator agree on."""

from __future__ import annotations

from typing import Final

from fedbpt.secure.shamir import SHARE_BYTES

FEWEST: Final = 3
"""Devices of a sum: of two, each would know the other's result."""


def threshold_of(n_devices: int) -> int:
    """Devices that remove the masks of a sum over ``n_devices`` together: more than two thirds, of three two.

    Then a coordinator that tells devices different survivors, or different peers, can learn no sum over less than a
    third of them (2t − n), and cannot have one device's mask removed while the others take it for dropped.
    """
    return 2 if n_devices == FEWEST else 2 * n_devices // 3 + 1


ATTEMPTS: Final = 3
"""How often a sum is tried: devices may drop out before enough of them have revealed their shares."""

USES: Final = 64
"""Sums of an epoch."""

SEALED_BYTES: Final = 2 * SHARE_BYTES + 16
"""Length of the shares of both secrets of a use, sealed: with a tag of 16 bytes."""

SKETCH_RANK: Final = 32
"""Most columns of a sketch of states: with as many rows a fold, over all devices, its sums are exact."""

MOST_SKETCH_BYTES: Final = 12 * 2**20
"""Most bytes of the sums of states in one message, whose body has at most 16 MiB."""


def most_readers(n_folds: int, n_labels: int, n_embd: int) -> int:
    """Readers whose sums, with sketches of 8 columns, fit into a message."""
    return max(MOST_SKETCH_BYTES // max(4 * n_folds * n_embd * (n_labels + 9), 1), 1)


def sketch_rank(n_readers: int, n_folds: int, n_labels: int, n_embd: int) -> int:
    """Columns of the sketches that fit into a message, with 4 bytes a number; at least 1."""
    a_column = max(4 * n_readers * n_folds * n_embd, 1)
    return max(min(MOST_SKETCH_BYTES // a_column - n_labels - 1, SKETCH_RANK), 1)
