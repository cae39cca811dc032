"""Models with LayerNorm: learned, rotary or ALiBi positions, biases, parallel attention and feed-forward."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from architecture import Architecture, Parts, head_size
from conversion import joined_by_head, one_added_to_norms, transposed

if TYPE_CHECKING:
    from torch import Tensor

# llama.cpp looks GELU up in a table of half-precision values; this keeps its rounding error small.
SMALL_MLP = {"mlp.c_proj.weight": 0.1, "dense_4h_to_h.weight": 0.1, "down_proj.weight": 0.1, "fc2.weight": 0.1}
GPT2: dict[str, Any] = {
    "hidden_size": None,
    "intermediate_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": None,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
}
BLOOM: dict[str, Any] = {
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "intermediate_size": None,
    "n_layer": 3,
    "n_head": 4,
}
MPT: dict[str, Any] = {
    "hidden_size": None,
    "intermediate_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": None,
    "d_model": 64,
    "n_layers": 3,
    "n_heads": 4,
    "max_seq_len": 512,
}
FALCON: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "intermediate_size": None,
    "ffn_hidden_size": 128,
}


def bloom_settings(_model: Any) -> dict[str, Any]:
    """ALiBi positions have no limit."""
    return {"context_length": 512}


def mpt_settings(model: Any) -> dict[str, Any]:
    attention = model.config.attn_config
    return {
        "attention.clamp_kqv": attention.clip_qkv,
        "attention.max_alibi_bias": float(attention.alibi_bias_max),
    }


def falcon_settings(model: Any) -> dict[str, Any]:
    config = model.config
    return {"attention.head_count_kv": config.num_kv_heads if config.new_decoder_architecture else 1}


def falcon_tensors(name: str, tensor: Tensor, config: Any) -> Parts:
    """Split Q, K and V joined group by group: the queries of a group, then its key and its value."""
    import torch

    if "query_key_value" in name:
        n_groups = config.num_kv_heads if config.new_decoder_architecture else 1
        groups = tensor.reshape(n_groups, -1, head_size(config), tensor.shape[-1])
        parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
        tensor = torch.cat([part.reshape(-1, tensor.shape[-1]) for part in parts])
    yield name, tensor


def parallel(model: Any) -> dict[str, Any]:
    return {"use_parallel_residual": model.config.use_parallel_residual}


def nemotron_settings(model: Any) -> dict[str, Any]:
    return {"attention.layer_norm_epsilon": model.config.norm_eps, "attention.layer_norm_rms_epsilon": None}


def command_r_settings(model: Any) -> dict[str, Any]:
    return {"logit_scale": model.config.logit_scale, "rope.scaling.type": "none"}


def without_prefix(name: str, tensor: Tensor, config: Any) -> Parts:
    for part, values in joined_by_head(name, tensor, config):
        yield re.sub(r"^transformer\.", "", part), values


ARCHITECTURES = (
    Architecture(
        "gpt2",
        "gpt2",
        GPT2,
        tensors=transposed(".c_attn.weight", ".c_proj.weight", ".c_fc.weight"),
        gains=SMALL_MLP | {"attn.c_proj.weight": 1.5},
        tolerance=3e-4,
    ),
    Architecture(
        "gptneox",
        "gpt_neox",
        {"num_key_value_heads": None, "hidden_act": "gelu_new"},
        parallel,
        joined_by_head,
        gains=SMALL_MLP,
        tolerance=3e-4,
    ),
    Architecture(
        "gptneox (one after the other)",
        "gpt_neox",
        {"num_key_value_heads": None, "hidden_act": "gelu_new", "use_parallel_residual": False},
        parallel,
        joined_by_head,
        gains=SMALL_MLP,
        tolerance=3e-4,
    ),
    Architecture("bloom", "bloom", BLOOM, bloom_settings, without_prefix, gains=SMALL_MLP, tolerance=3e-4),
    Architecture("mpt", "mpt", MPT, mpt_settings, gains=SMALL_MLP, tolerance=1e-3),
    Architecture("falcon", "falcon", FALCON, falcon_settings, falcon_tensors, gains=SMALL_MLP, tolerance=1e-3),
    Architecture(
        "falcon (40B)",
        "falcon",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        falcon_settings,
        falcon_tensors,
        gains=SMALL_MLP,
        tolerance=1e-3,
    ),
    Architecture("starcoder", "gpt_bigcode", GPT2, gains=SMALL_MLP, tolerance=3e-4),
    Architecture("starcoder2", "starcoder2", {"sliding_window": None}, gains=SMALL_MLP, tolerance=3e-4),
    Architecture("stablelm", "stablelm", {"use_qkv_bias": True}, parallel),
    Architecture("phi2", "phi", gains=SMALL_MLP, tolerance=3e-4),
    Architecture("command-r", "cohere", {"logit_scale": 1.5}, command_r_settings),
    Architecture("nemotron", "nemotron", {}, nemotron_settings, one_added_to_norms),
    Architecture("jais2", "jais2"),
)
