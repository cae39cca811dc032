"""`DeviceState`: what a device keeps from round to round besides its rows and its model."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedbpt.errors import WireError
from fedbpt.objective.privacy import Released
from fedbpt.protocol import codec
from fedbpt.protocol.specs import Array, Message

KEY_BYTES: Final = 32


class Snapshot(Message, frozen=True):
    """The encoding of a `DeviceState`. Only for the device's own disk: ``key`` can remove a private report's noise."""

    key: bytes
    tokens_per_second: float | None = None
    fitted_to: bytes = b""
    fitted: Array | None = None
    released: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    spent: dict[str, Released] = msgspec.field(default_factory=dict)
    summed: tuple[str, ...] = ()
    told_exactly: bool = False
    protocol: Literal[1] = 1


@dataclass
class DeviceState:
    """Kept in memory, or by `to_bytes` if a process serves only one round.

    ``key``: seeds the device's noise (`fedbpt.objective.privacy.Releases`); never leaves the device. ``fitted``: cached
    logits [n_templates, n, n_labels + n_words] for the fit identified by ``fitted_to``, whose exchanges all use them.
    ``released``: by run, the questions that noisy sums of rows were sent for: one, or the tries of a secure sum.
    ``spent``: by question, what `PrivacyLimit` counts; ``summed``: the runs with a masked sum. ``told_exactly``:
    whether results without noise were sent, which no ε counts.
    """

    key: bytes = field(default_factory=lambda: secrets.token_bytes(KEY_BYTES), repr=False)
    tokens_per_second: float | None = None
    fitted_to: bytes = b""
    fitted: NDArray[np.float32] | None = None
    released: dict[str, tuple[str, ...]] = field(default_factory=dict)
    spent: dict[str, Released] = field(default_factory=dict)
    summed: set[str] = field(default_factory=set)
    told_exactly: bool = False

    def to_bytes(self) -> bytes:
        """Encode as a `Snapshot`. Logits too large for a message are left out, to be computed again."""
        fitted = self.fitted
        if fitted is not None and fitted.nbytes > codec.MAX_BODY_BYTES // 2:
            fitted = None
        return codec.encode(
            Snapshot(
                key=self.key,
                tokens_per_second=self.tokens_per_second,
                fitted_to=b"" if fitted is None else self.fitted_to,
                fitted=None if fitted is None else Array.of(fitted, "<f4"),
                released=self.released,
                spent=self.spent,
                summed=tuple(sorted(self.summed)),
                told_exactly=self.told_exactly,
            )
        )

    @classmethod
    def from_bytes(cls, body: bytes) -> DeviceState:
        """Decode a `Snapshot`. Raises `WireError` if it is damaged."""
        kept = codec.decode(body, Snapshot)
        if len(kept.key) != KEY_BYTES:
            raise WireError(f"key must have {KEY_BYTES} bytes, got {len(kept.key)}", field="key", limit=KEY_BYTES)
        fitted = None if kept.fitted is None else kept.fitted.numpy().astype(np.float32)
        return cls(
            kept.key,
            kept.tokens_per_second,
            kept.fitted_to,
            fitted,
            dict(kept.released),
            dict(kept.spent),
            set(kept.summed),
            kept.told_exactly,
        )
