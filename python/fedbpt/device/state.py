"""`DeviceState`: what a device remembers from round to round beside its rows and its model."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from fedbpt.errors import WireError
from fedbpt.protocol import codec
from fedbpt.protocol.specs import Array, Message

KEY_BYTES: Final = 32


class Snapshot(Message, frozen=True):
    """A `DeviceState` as bytes. For the device's own disk: who has ``key`` can take the noise off a private report."""

    key: bytes
    tokens_per_second: float | None = None
    fitted_to: bytes = b""
    fitted: Array | None = None
    protocol: Literal[1] = 1


@dataclass
class DeviceState:
    """Kept by the process, or by `to_bytes` where a process serves one round alone.

    ``key`` seeds the device's noise (`fedbpt.objective.privacy.Releases`) and never leaves the device. ``fitted``:
    logits [n_templates, n, n_labels + n_words] of the question ``fitted_to``, which a readout's fit asks many times.
    """

    key: bytes = field(default_factory=lambda: secrets.token_bytes(KEY_BYTES), repr=False)
    tokens_per_second: float | None = None
    fitted_to: bytes = b""
    fitted: NDArray[np.float32] | None = None

    def to_bytes(self) -> bytes:
        """A snapshot. Logits that take more than a message may are left out: they are computed again."""
        fitted = self.fitted
        if fitted is not None and fitted.nbytes > codec.MAX_BODY_BYTES // 2:
            fitted = None
        return codec.encode(
            Snapshot(
                key=self.key,
                tokens_per_second=self.tokens_per_second,
                fitted_to=b"" if fitted is None else self.fitted_to,
                fitted=None if fitted is None else Array.of(fitted, "<f4"),
            )
        )

    @classmethod
    def from_bytes(cls, body: bytes) -> DeviceState:
        """The state of a snapshot. Raises `WireError` where it is damaged."""
        kept = codec.decode(body, Snapshot)
        if len(kept.key) != KEY_BYTES:
            raise WireError(f"a device's key has {KEY_BYTES} bytes, this one {len(kept.key)}")
        fitted = None if kept.fitted is None else kept.fitted.numpy().astype(np.float32)
        return cls(kept.key, kept.tokens_per_second, kept.fitted_to, fitted)
