"""What makes a tiny model of one architecture: a configuration of transformers', and how a GGUF file holds it."""

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
    """One row of the table: an architecture that llama.cpp and transformers both have."""

    name: str
    """What tests and docs/models.md call it: GGUF's name of the architecture, and a variant of it in brackets."""
    model_type: str
    """transformers' name of the configuration; with a colon, of the class too, where it is not the usual one."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What differs from `SIZES`; None leaves an entry out."""
    settings: Callable[[Any], dict[str, Any]] = nothing
    """From the model, GGUF settings by their names without the architecture; `common_settings` are there already."""
    tensors: Callable[[str, Tensor, Any], Parts] = as_they_are
    """What a parameter becomes: named as in transformers, where `gguf` knows the name, or as in the file."""
    named_as: str = ""
    """The architecture whose tensor names are used, where `gguf` does not have this one's."""
    extra: Callable[[Any], dict[str, Tensor]] = nothing
    """Tensors of the file that are no parameters of the model."""
    gains: Mapping[str, float] = field(default_factory=dict)
    """Spread of a matrix's products or a vector's values, by the end of its name; beside `hugging_face.GAINS`."""
    means: Mapping[str, float] = field(default_factory=dict)
    """What is added to a vector's values, by the end of its name."""
    n_window: int = 0
    """Positions that a token sees in layers with sliding windows; 0: there are none."""
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
        """Of the configuration."""
        return {name: value for name, value in {**SIZES, **self.config}.items() if value is not None}

    @property
    def tensor_names(self) -> gguf.TensorNameMap:
        """From transformers' names to those of the file."""
        kind = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[self.named_as or self.gguf]
        return gguf.get_tensor_name_map(kind, 99)


def find(config: Any, *names: str) -> Any:
    """The first of a configuration's fields that is set, or None."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if value is not None), None)


def head_size(config: Any) -> int:
    return int(find(config, "head_dim") or find(config, "hidden_size") // find(config, "num_attention_heads"))


def common_settings(config: Any) -> dict[str, Any]:
    """What every architecture has, or what many have under the same name."""
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
