"""A forward pass in numpy float64, written from the models' definitions: one text at a time, nothing shared, no cache.

- llama: Touvron et al. 2023, "LLaMA" (arXiv:2302.13971): pre-norm RMSNorm, SwiGLU (Shazeer 2020,
  arXiv:2002.05202), rotary positions (Su et al. 2021, arXiv:2104.09864); grouped queries: Ainslie et al. 2023,
  arXiv:2305.13245.
- qwen2: Yang et al. 2024, "Qwen2 Technical Report" (arXiv:2407.10671): the same with biases on Q, K and V.
- gemma3: Gemma Team 2025, "Gemma 3 Technical Report" (arXiv:2503.19786): embeddings times sqrt(n_embd), norms
  before and after each sub-layer, RMSNorm on queries and keys, GeGLU, five sliding-window layers (rotary base
  10,000) to each global one.

Two conventions belong to the GGUF format, not to the papers. Rotary pairs: llama files hold Q and K permuted so
that neighbouring entries (2i, 2i+1) turn together; the others turn (i, i + d/2). Gemma's norm weights hold 1 + w.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from numpy.typing import ArrayLike, NDArray

Rows = NDArray[np.float64]

GEMMA_LOCAL_ROPE_BASE = 10_000.0
GEMMA_LAYERS_PER_GLOBAL = 6


class CausalModel:
    """A model by its definition: `logits` of one text, and functions of them."""

    n_vocab: int
    n_embd: int

    @property
    def embedding_table(self) -> Rows:
        """[n_vocab, n_embd], in the scale of fedbpt's rows."""
        raise NotImplementedError

    def logits(self, inputs: ArrayLike) -> Rows:
        """Logits [n, n_vocab] at every position of ``inputs``: token ids [n] or embedding rows [n, n_embd]."""
        raise NotImplementedError

    def token_embeddings(self, ids: ArrayLike) -> Rows:
        """[len(ids), n_embd]."""
        return self.embedding_table[np.asarray(ids, dtype=np.int64)]

    def score(
        self,
        tokens: Sequence[ArrayLike],
        embeds: ArrayLike,
        label_ids: ArrayLike | None = None,
        placement: Literal["front", "cue"] = "front",
        prefix: ArrayLike | None = None,
    ) -> Rows:
        """`fedbpt.engine.scorer.Scorer.score_with_soft_prompt`, naively: one text and one candidate at a time."""
        embeds = np.asarray(embeds, dtype=np.float64)
        candidates = embeds[None] if embeds.ndim == 2 else embeds
        before = self.token_embeddings([] if prefix is None else prefix)
        labels = np.arange(self.n_vocab) if label_ids is None else np.asarray(label_ids)
        result = np.empty((len(candidates), len(tokens), len(labels)))
        for c, prompt in enumerate(candidates):
            for t, text in enumerate(tokens):
                rows = self.token_embeddings(text)
                if placement == "front":
                    parts = [before, prompt, rows]
                else:
                    parts = [before, rows[: len(rows) - len(prompt)], prompt]
                result[c, t] = self.logits(np.concatenate(parts))[-1, labels]
        return result


class Reference(CausalModel):
    """The weights of a model file, dequantised to float64, and its settings."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self._fields = {name: field.contents() for name, field in reader.fields.items()}
        self._weights = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
            for tensor in reader.tensors
        }
        self.architecture: str = self._fields["general.architecture"]
        if self.architecture not in ("llama", "qwen2", "gemma3"):
            raise ValueError(f"no reference for architecture {self.architecture!r}")
        self.n_embd: int = self._setting("embedding_length")
        self.n_ctx: int = self._setting("context_length")
        self.n_layer: int = self._setting("block_count")
        self.n_head: int = self._setting("attention.head_count")
        self.n_head_kv: int = self._setting("attention.head_count_kv", self.n_head)
        self.head_dim: int = self._setting("attention.key_length", self.n_embd // self.n_head)
        self.rms_eps: float = self._setting("attention.layer_norm_rms_epsilon")
        self.rope_base: float = self._setting("rope.freq_base", 10_000.0)
        self.n_vocab: int = self._weights["token_embd.weight"].shape[0]

    def _setting(self, key: str, default: Any = None) -> Any:
        value = self._fields.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise KeyError(f"{self.architecture}.{key}")
        return value

    # --- input -----------

    @property
    def embedding_table(self) -> Rows:
        """[n_vocab, n_embd], in the scale of the first layer's input."""
        table = self._weights["token_embd.weight"]
        return table * np.sqrt(self.n_embd) if self.architecture == "gemma3" else table

    # --- output ------------

    def logits(self, inputs: ArrayLike) -> Rows:
        """Logits [n, n_vocab] at every position of ``inputs``: token ids [n] or embedding rows [n, n_embd]."""
        inputs = np.asarray(inputs)
        x = self.token_embeddings(inputs) if inputs.ndim == 1 else inputs.astype(np.float64)
        for layer in range(self.n_layer):
            x = self._layer(layer, x)
        x = self._rms_norm(x, self._weights["output_norm.weight"])
        head = self._weights.get("output.weight", self._weights["token_embd.weight"])
        return x @ head.T + self._weights.get("output.bias", 0.0)

    # --- the layers ---

    def _layer(self, layer: int, x: Rows) -> Rows:
        gemma = self.architecture == "gemma3"
        attention = self._attention(layer, self._rms_norm(x, self._weight(layer, "attn_norm")))
        if gemma:
            attention = self._rms_norm(attention, self._weight(layer, "post_attention_norm"))
        x = x + attention
        feed_forward = self._feed_forward(layer, self._rms_norm(x, self._weight(layer, "ffn_norm")))
        if gemma:
            feed_forward = self._rms_norm(feed_forward, self._weight(layer, "post_ffw_norm"))
        return x + feed_forward

    def _attention(self, layer: int, x: Rows) -> Rows:
        n = len(x)
        q = self._project(layer, "attn_q", x).reshape(n, self.n_head, self.head_dim)
        k = self._project(layer, "attn_k", x).reshape(n, self.n_head_kv, self.head_dim)
        v = self._project(layer, "attn_v", x).reshape(n, self.n_head_kv, self.head_dim)
        if self.architecture == "gemma3":
            q = self._rms_norm(q, self._weight(layer, "attn_q_norm"))
            k = self._rms_norm(k, self._weight(layer, "attn_k_norm"))
        window = self._window(layer)
        base = GEMMA_LOCAL_ROPE_BASE if window else self.rope_base
        q, k = self._rotate(q, base), self._rotate(k, base)

        distance = np.arange(n)[:, None] - np.arange(n)[None, :]
        visible = distance >= 0
        if window:
            visible &= distance < window
        out = np.empty((n, self.n_head, self.head_dim))
        for head in range(self.n_head):
            shared = head // (self.n_head // self.n_head_kv)
            scores = q[:, head] @ k[:, shared].T / np.sqrt(self.head_dim)
            out[:, head] = _softmax(np.where(visible, scores, -np.inf)) @ v[:, shared]
        return self._project(layer, "attn_output", out.reshape(n, -1))

    def _window(self, layer: int) -> int:
        """Number of positions, its own included, that a position of this layer sees; 0: all earlier ones."""
        if self.architecture != "gemma3" or (layer + 1) % GEMMA_LAYERS_PER_GLOBAL == 0:
            return 0
        return int(self._setting("attention.sliding_window", 0))

    def _rotate(self, x: Rows, base: float) -> Rows:
        """Rotary positions on [n, heads, head_dim]: pair i of position p turns by p * base^(-2i/head_dim)."""
        half = self.head_dim // 2
        angles = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
        cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]
        turned = np.empty_like(x)
        if self.architecture == "llama":
            first, second = slice(0, None, 2), slice(1, None, 2)
        else:
            first, second = slice(0, half), slice(half, None)
        turned[..., first] = x[..., first] * cos - x[..., second] * sin
        turned[..., second] = x[..., first] * sin + x[..., second] * cos
        return turned

    def _feed_forward(self, layer: int, x: Rows) -> Rows:
        activation = _gelu if self.architecture == "gemma3" else _silu
        gate, up = self._project(layer, "ffn_gate", x), self._project(layer, "ffn_up", x)
        return self._project(layer, "ffn_down", activation(gate) * up)

    def _project(self, layer: int, name: str, x: Rows) -> Rows:
        bias = self._weights.get(f"blk.{layer}.{name}.bias", np.float64(0))
        return x @ self._weight(layer, name).T + bias

    def _weight(self, layer: int, name: str) -> Rows:
        return self._weights[f"blk.{layer}.{name}.weight"]

    def _rms_norm(self, x: Rows, weight: Rows) -> Rows:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.rms_eps) * weight


def _softmax(scores: Rows) -> Rows:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _silu(x: Rows) -> Rows:
    return x / (1 + np.exp(-x))


def _gelu(x: Rows) -> Rows:
    """The tanh approximation, which Gemma was trained with."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
