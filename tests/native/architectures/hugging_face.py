"""Tiny random models in transformers: the independent reference, and the source of the GGUF files' weights.

Importing this module does not import PyTorch; if it is missing, `require` skips the test.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architecture import Architecture
from conversion import Weights, is_tied
from numpy.typing import ArrayLike, NDArray
from reference import CausalModel, Rows
from tiny_case import Case

SELECTION_BIASES = ("correction_bias", "expert_bias")
# Spread of a matrix's products with rows of spread 1, by the end of its name. Attention is sharp enough to matter, and
# experts' scores are far enough apart that rounding does not change the selection.
GAINS = {
    "q_proj.weight": 1.3,
    "k_proj.weight": 1.3,
    "v_proj.weight": 1.5,
    "o_proj.weight": 1.5,
    "gate.weight": 2.0,
    "router.weight": 2.0,
    "down_proj.weight": 1.0,
    "down_proj": 1.0,
    "sinks": 1.0,
    **dict.fromkeys(SELECTION_BIASES, 0.5),
    "lm_head.weight": 3.0,
    "embed_out.weight": 3.0,
}
GAIN = 1.5  # spread for all other matrices
MEANS = {"sinks": 2.0}  # offsets of vectors' values


def require() -> None:
    """Skip the test unless PyTorch and transformers are installed."""
    if any(find_spec(name) is None for name in ("torch", "transformers")):
        pytest.skip("comparing with transformers needs torch and transformers: pip install '.[peft]'")


def build(architecture: Architecture) -> Any:
    """Build the model, with seeded weights that float16 represents exactly, so that f16 and f32 files are equal."""
    import torch
    import transformers

    torch.set_num_threads(1)  # on a busy machine, synchronising threads slows tiny models down a hundredfold
    transformers.logging.set_verbosity_error()
    kind, _, name = architecture.model_type.partition(":")
    config = transformers.AutoConfig.for_model(kind, **architecture.fields)
    make = getattr(transformers, name)._from_config if name else transformers.AutoModelForCausalLM.from_config
    model = make(config, attn_implementation="eager")
    draw_weights(model, architecture)
    return model.eval()


def draw_weights(model: Any, architecture: Architecture) -> None:
    """Draw each parameter with a spread at which errors are far larger than rounding."""
    import torch

    random = torch.Generator().manual_seed(sum(map(ord, architecture.name)))
    gains = {**GAINS, **architecture.gains}
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        for name, values in [*model.named_parameters(), *selection_biases(model)]:
            drawn = torch.randn(values.shape, generator=random)
            if values is table:
                drawn *= gains.get("table", 3.0 / values.shape[1] ** 0.5 if is_tied(model) else 1.0)
            elif values.ndim == 1:
                # norms' weights are still ones, or zeros if one is added to them; biases are zeros
                constant = values[0] if (values == values[0]).all() else 0.0
                mean = constant + by_end({**MEANS, **architecture.means}, name, 0.0)
                drawn = mean + by_end(gains, name, 0.25) * drawn
            else:
                drawn *= by_end(gains, name, GAIN) / n_inputs(name, values, model) ** 0.5
            values.copy_(drawn.half().float())


def selection_biases(model: Any) -> list[tuple[str, Any]]:
    """Biases of experts' scores in the selection: buffers, not parameters, since they are not trained by gradients."""
    return [(name, values) for name, values in model.named_buffers() if name.endswith(SELECTION_BIASES)]


def by_end(values: Mapping[str, float], name: str, default: float) -> float:
    """The value of the longest key that ``name`` ends in."""
    return next((values[end] for end in sorted(values, key=len, reverse=True) if name.endswith(end)), default)


def n_inputs(name: str, values: Any, model: Any) -> int:
    """Number of terms that an entry of a matrix's product sums."""
    import transformers

    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, transformers.pytorch_utils.Conv1D) or getattr(owner, "is_transposed", False):
        return int(values.shape[-2])
    return int(values.shape[-1])


class HuggingFace(CausalModel):
    """A transformers model with rows in fedbpt's scale, one text at a time, no cache."""

    def __init__(self, architecture: Architecture) -> None:
        require()
        self.model = build(architecture)
        self._row_scale = architecture.row_scale
        table = self.model.get_input_embeddings()
        self.n_vocab: int = table.weight.shape[0]
        self.n_embd: int = table.weight.shape[1]
        self._known: dict[bytes, Rows] = {}

    @cached_property
    def embedding_table(self) -> Rows:
        """[n_vocab, n_embd]."""
        import torch

        with torch.no_grad():
            rows = self.model.get_input_embeddings()(torch.arange(self.n_vocab))
        return rows.numpy().astype(np.float64) * self._row_scale

    def logits(self, inputs: ArrayLike) -> NDArray[np.float64]:
        """Logits [n, n_vocab] at every position of ``inputs``: token ids [n] or embedding rows [n, n_embd]."""
        import torch

        inputs = np.asarray(inputs)
        key = inputs.tobytes()
        if key not in self._known:
            with torch.no_grad():
                found = self.forward(self.token_embeddings(inputs) if inputs.ndim == 1 else inputs)
            self._known[key] = found.numpy().astype(np.float64)
        return self._known[key]

    def forward(self, rows: Rows) -> Any:
        """Logits [n, n_vocab] of embedding rows [n, n_embd] in PyTorch."""
        import torch

        given = torch.from_numpy((rows / self._row_scale).astype(np.float32))[None]
        found = self.model(inputs_embeds=given, use_cache=False)
        if self.model.get_output_embeddings() is None:
            return found.last_hidden_state[0] @ self.model.get_input_embeddings().weight.T
        return found.logits[0]


class ArchitectureCase(Case):
    """A model whose `reference` is transformers'."""

    model: Architecture

    def __init__(self, model: Architecture, path: Path, reference: HuggingFace, weights: Weights) -> None:
        super().__init__(model, path)
        self.__dict__.update(reference=reference, weights=weights)
