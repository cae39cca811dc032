"""Bounded number types for the fields of messages.

What a device sends (`Rows` and the types after it) is bounded on both sides, so that sums over all devices and rounds
fit the 64 bits of SQLite and MessagePack. `fedbpt.coordinator.reports.report_checks` adds tighter bounds from the plan.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

import msgspec

LARGEST: Final = 2**63 - 1
"""Largest integer of SQLite and of every MessagePack reader."""

PositiveInt: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=LARGEST)]
NaturalInt: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=LARGEST)]
PositiveFloat: TypeAlias = Annotated[float, msgspec.Meta(gt=0)]
Scale: TypeAlias = Annotated[float, msgspec.Meta(ge=1e-4, le=1e4)]
"""Scale of a search or prompt: keeps latents within `fedbpt.protocol.codec.MAX_NORM`, embeddings within float32."""
Clip: TypeAlias = Annotated[float, msgspec.Meta(ge=1e-3, le=1e4)]
"""Norm at which a row's numbers are clipped: no division by it overflows."""
LossClip: TypeAlias = Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)]
"""Norm at which a row's losses are clipped, nats."""
NoiseMultiplier: TypeAlias = Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)]
"""Standard deviation of noise over the sensitivity of what it is added to."""
Length: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=10**6)]
"""Length of a latent vector, a prompt or a population."""
Threads: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=512)]
"""Number of compute threads; 512 is ggml's maximum."""
GpuLayers: TypeAlias = Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)]
TokenId: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]

Rows: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=10**9)]
SomeRows: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=10**9)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
"""Number of rounds, steps, candidates or pieces of text, or a dimension of an array."""
Tokens: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**44)]
Bytes: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**50)]
Seconds: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Speed: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
"""Tokens per second."""
Celsius: TypeAlias = Annotated[float, msgspec.Meta(ge=-300, le=1000)]
Percent: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=100)]
Probability: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1 + 1e-9)]
LossSum: TypeAlias = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]
"""A loss or a sum of losses; may be negative with privacy noise."""
Variance: TypeAlias = Annotated[float, msgspec.Meta(gt=0, le=1e30)]
