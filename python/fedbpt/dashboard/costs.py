"""Costs of other tuning methods: their traffic, computed from the model's shapes, and their measured memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from fedbpt import models
from fedbpt.decoders import from_json
from fedbpt.errors import ModelError

FLOAT_BYTES: Final = 4
"""Other methods send float32, as their reference implementations do."""

LORA_RANK: Final = 8
VIRTUAL_TOKENS: Final = 50
"""Length of the averaged soft prompt, as used by FedBPT's authors and PEFT's examples."""

FORMULA: Final = (
    "2 × parameters × 4 bytes for each report of a device in a round of the search: float32, down and up. "
    "Full fine-tuning: all weights. LoRA: r·(inputs + outputs), r = 8, of each layer's query and value projections. "
    "Soft-prompt FedAvg: 50 tokens × embedding size. "
    "This run: message bodies, including polls and retries."
)


class ModelShape(NamedTuple):
    """Sizes of a model. ``adapted``: inputs + outputs, summed over all query and value projections."""

    n_weights: int
    n_embd: int
    adapted: int


def shape_of(path: Path) -> ModelShape:
    """Read the sizes from a model file's header. Raises `ModelFileError`."""
    shapes = models.tensor_shapes(path)
    adapted = sum(sum(shape) for name, shape in shapes.items() if name.endswith(("attn_q.weight", "attn_v.weight")))
    return ModelShape(sum(math.prod(shape) for shape in shapes.values()), shapes["token_embd.weight"][0], adapted)


def shape_of_model(name: str, fingerprint: str) -> ModelShape | None:
    """The shape of model ``name``, or None if this machine does not have the file with ``fingerprint``."""
    try:
        path = models.locate(name)
        return shape_of(path) if models.fingerprint(path) == fingerprint else None
    except ModelError:
        return None


def bytes_of_others(shape: ModelShape, participations: int) -> dict[str, int]:
    """Bytes that each other method would have sent for as many reports, in ascending order. See `FORMULA`."""
    parameters = {
        "Soft-prompt FedAvg": VIRTUAL_TOKENS * shape.n_embd,
        "LoRA, r = 8": LORA_RANK * shape.adapted,
        "Full fine-tuning": shape.n_weights,
    }
    return {name: 2 * FLOAT_BYTES * count * participations for name, count in parameters.items()}


class MemoryFigures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Peak memory of a process by method, in bytes, measured by ``benchmarks/bench_memory.py``."""

    model: str
    machine: str
    date: str
    how: str
    peak_rss: dict[str, int]

    def of_others(self) -> dict[str, int]:
        """The figures of other methods: fedbpt's own are replaced by the run's."""
        return {name: size for name, size in self.peak_rss.items() if not name.startswith("fedbpt")}


def memory_figures(model: str) -> MemoryFigures | None:
    """The measurements for ``model``; None if there are none."""
    content = Path(__file__).with_name("memory.json").read_bytes()
    measured: Mapping[str, MemoryFigures] = {found.model: found for found in from_json(content, list[MemoryFigures])}
    return measured.get(model)
