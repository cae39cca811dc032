"""A tiny model of one architecture: its configuration in transformers, and its conversion to GGUF."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gguf

if TYPE_CHECKING:
    from torch import Tensor

Parts = Iterable[tuple[str, "Tensor"]]

# Widths are multiples of 32, so that every weight format is possible.
SIZES: dict[str, Any] = {
    "vocab_size": 416,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def nothing(_model: Any) -> dict[str, Any]:
    return {}


def as_they_are(name: str, tensor: Tensor, _config: Any) -> Parts:
    yield name, tensor


@dataclass(frozen=True)
class Architecture:
    """A row of the table: an architecture that both llama.cpp and transformers implement."""

    name: str
    """Name in tests and docs/models.md: GGUF's name of the architecture, with a variant in brackets."""
    model_type: str
    """transformers' name of the configuration; followed by a colon and the class if it is not the usual one."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Differences from `SIZES`; None removes an entry."""
    settings: Callable[[Any], dict[str, Any]] = nothing
    """Makes GGUF settings of the model, named without the architecture, in addition to `common_settings`."""
    tensors: Callable[[str, Tensor, Any], Parts] = as_they_are
    """Converts a parameter; results are named as in transformers if `gguf` knows the name, else as in the file."""
    named_as: str = ""
    """Architecture whose tensor names are used if `gguf` lacks this one's."""
    extra: Callable[[Any], dict[str, Tensor]] = nothing
    """Tensors of the file that are not parameters of the model."""
    gains: Mapping[str, float] = field(default_factory=dict)
    """Spread of a matrix's products or a vector's values, by the end of its name; extends `hugging_face.GAINS`."""
    means: Mapping[str, float] = field(default_factory=dict)
    """Offsets of vectors' values, by the end of their names."""
    n_window: int = 0
    """Size of the sliding windows in positions; 0: no windows."""
    tolerance: float = 1e-4
    """Largest error of a logit of a float32 file, relative to the standard deviation of the logits."""
    row_scale: float = 1.0
    """fedbpt's rows divided by transformers' ``inputs_embeds``."""

    @property
    def gguf(self) -> str:
        """`general.architecture`."""
        return self.name.split(" ")[0]

    @property
    def n_vocab(self) -> int:
        return int(self.fields["vocab_size"])

    @property
    def n_embd(self) -> int:
        return int(next(self.fields[name] for name in ("hidden_size", "n_embd", "d_model") if name in self.fields))

    @property
    def fields(self) -> dict[str, Any]:
        """Name of the configuration class."""
        return {name: value for name, value in {**SIZES, **self.config}.items() if value is not None}

    @property
    def tensor_names(self) -> gguf.TensorNameMap:
        """Map from transformers' names to those of the file."""
        kind = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[self.named_as or self.gguf]
        return gguf.get_tensor_name_map(kind, 99)


def find(config: Any, *names: str) -> Any:
    """The first of a configuration's fields that is set; None if none is."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if value is not None), None)


def head_size(config: Any) -> int:
    return int(find(config, "head_dim") or find(config, "hidden_size") // find(config, "num_attention_heads"))


def common_settings(config: Any) -> dict[str, Any]:
    """Settings that all architectures have, or many under the same name."""
    rope = find(config, "rope_parameters") or {}
    whole = rope.get("full_attention", rope)
    head = head_size(config)
    found = {
        "vocab_size": find(config, "vocab_size"),
        "context_length": find(config, "max_position_embeddings", "n_positions", "max_seq_len"),
        "embedding_length": find(config, "hidden_size"),
        "block_count": find(config, "num_hidden_layers"),
        "feed_forward_length": find(config, "intermediate_size", "ffn_hidden_size") or 4 * find(config, "hidden_size"),
        "attention.head_count": find(config, "num_attention_heads"),
        "attention.head_count_kv": find(config, "num_key_value_heads"),
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": find(config, "rms_norm_eps"),
        "attention.layer_norm_epsilon": find(config, "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
        "rope.freq_base": whole.get("rope_theta"),
        "rope.dimension_count": int(head * whole.get("partial_rotary_factor", 1.0)) if whole else None,
        "expert_count": find(config, "num_local_experts", "num_experts", "n_routed_experts"),
        "expert_used_count": find(config, "num_experts_per_tok"),
    }
    return {name: value for name, value in found.items() if value is not None}
