"""Numbers as messages hold them, each with its bounds.

What a device sends is bounded on both sides (`Rows` and below): sums over all devices and rounds then fit the 64 bits
of SQLite and MessagePack. `fedbpt.coordinator.report_checks` bounds most of it further, by what was asked for.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

import msgspec

LARGEST: Final = 2**63 - 1
"""What SQLite holds, and every reader of MessagePack."""

PositiveInt: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=LARGEST)]
NaturalInt: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=LARGEST)]
PositiveFloat: TypeAlias = Annotated[float, msgspec.Meta(gt=0)]
Scale: TypeAlias = Annotated[float, msgspec.Meta(ge=1e-4, le=1e4)]
"""Of a search and of its prompts: latents then stay within `fedbpt.protocol.codec.MAX_NORM`, embeddings within float32.
"""
Length: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=10**6)]
"""Of a latent, of a prompt, of a population."""
Threads: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=512)]
"""That compute: ggml has no more."""
GpuLayers: TypeAlias = Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)]
TokenId: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]

Rows: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=10**9)]
SomeRows: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=10**9)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
"""Of rounds, steps, candidates, pieces of text; a size of an array."""
Tokens: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**44)]
Bytes: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**50)]
Seconds: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Speed: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
"""Tokens a second."""
Celsius: TypeAlias = Annotated[float, msgspec.Meta(ge=-300, le=1000)]
Percent: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=100)]
Probability: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1 + 1e-9)]
LossSum: TypeAlias = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]
"""A loss, or a sum of losses; with noise it may be negative."""
Variance: TypeAlias = Annotated[float, msgspec.Meta(gt=0, le=1e30)]
