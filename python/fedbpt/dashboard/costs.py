"""What other ways to tune a model would have sent, by its shapes, and what memory they were measured to take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from fedbpt import models
from fedbpt.errors import ModelError

FLOAT_BYTES: Final = 4
"""Others send float32, as their reference implementations do."""

LORA_RANK: Final = 8
VIRTUAL_TOKENS: Final = 50
"""Of the soft prompt that is averaged: as FedBPT's authors and PEFT's examples have it."""

FORMULA: Final = (
    "2 × parameters × 4 bytes for each report of a device in a round of the search: float32, down and up. "
    "Full fine-tuning: all weights. LoRA: r·(inputs + outputs), r = 8, of each layer's query and value projections. "
    "Soft-prompt FedAvg: 50 tokens × the embedding's width. "
    "This run: bodies of messages, polls and repetitions included."
)


class ModelShape(NamedTuple):
    """Of a model file. ``adapted``: inputs + outputs, summed over all query and value projections."""

    n_weights: int
    n_embd: int
    adapted: int


def shape_of(path: Path) -> ModelShape:
    """Read from a model file's header. Raises `ModelFileError`."""
    shapes = models.tensor_shapes(path)
    adapted = sum(sum(shape) for name, shape in shapes.items() if name.endswith(("attn_q.weight", "attn_v.weight")))
    return ModelShape(sum(math.prod(shape) for shape in shapes.values()), shapes["token_embd.weight"][0], adapted)


def shape_of_model(name: str, fingerprint: str) -> ModelShape | None:
    """The shape of the model ``name`` where this machine has the very file; else None: it lies on the devices alone."""
    try:
        path = models.locate(name)
        return shape_of(path) if models.fingerprint(path) == fingerprint else None
    except ModelError:
        return None


def bytes_of_others(shape: ModelShape, participations: int) -> dict[str, int]:
    """What each other way would have sent for as many reports, bytes, the least first. See `FORMULA`."""
    parameters = {
        "Soft-prompt FedAvg": VIRTUAL_TOKENS * shape.n_embd,
        "LoRA, r = 8": LORA_RANK * shape.adapted,
        "Full fine-tuning": shape.n_weights,
    }
    return {name: 2 * FLOAT_BYTES * count * participations for name, count in parameters.items()}


class MemoryFigures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Peak memory of a process, bytes, as ``benchmarks/bench_memory.py`` measured it for ``model`` on ``machine``."""

    model: str
    machine: str
    date: str
    how: str
    peak_rss: dict[str, int]

    def of_others(self) -> dict[str, int]:
        """Without what fedbpt itself took in the benchmark: a run's own figure stands for it."""
        return {name: size for name, size in self.peak_rss.items() if not name.startswith("fedbpt")}


def memory_figures(model: str) -> MemoryFigures | None:
    """What was measured for ``model``; None: nothing was."""
    content = Path(__file__).with_name("memory.json").read_bytes()
    measured: Mapping[str, MemoryFigures] = {
        found.model: found for found in msgspec.json.decode(content, type=list[MemoryFigures])
    }
    return measured.get(model)
