"""Models with two sets of rotary frequencies: Ding et al. 2024, "LongRoPE" (arXiv:2402.13753)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from architecture import Architecture
from conversion import rotary_neighbours

if TYPE_CHECKING:
    from torch import Tensor

N_ORIGINAL = 640  # context in tokens of the original training, up to which a text uses the short set
ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": N_ORIGINAL,
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6],
    "long_factor": [1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 10.0],
}


def both_sets(model: Any) -> dict[str, Tensor]:
    import torch

    rope = model.config.rope_parameters
    return {f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"]) for kind in ("short", "long")}


def settings(model: Any) -> dict[str, Any]:
    stretched = model.config.max_position_embeddings / N_ORIGINAL
    return {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": N_ORIGINAL,
        "rope.scaling.attn_factor": math.sqrt(1 + math.log(stretched) / math.log(N_ORIGINAL)),
    }


def config(**differences: Any) -> dict[str, Any]:
    return {
        "max_position_embeddings": 2048,
        "original_max_position_embeddings": N_ORIGINAL,
        "rope_parameters": {**ROPE, **differences},
    }


ARCHITECTURES = (
    Architecture(
        "phi3 (LongRoPE)", "phi3", {**config(), "sliding_window": None}, settings, extra=both_sets, tolerance=3e-4
    ),
    Architecture("llama (LongRoPE)", "llama", config(), settings, rotary_neighbours, extra=both_sets, tolerance=3e-4),
)
