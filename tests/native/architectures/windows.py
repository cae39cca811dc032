"""Models in which some layers see only a window or a chunk of positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from architecture import Architecture, Parts
from conversion import (
    chain,
    expert_settings,
    layer,
    one_added_to_norms,
    renamed,
    rotary_neighbours,
    together,
    window_settings,
    yarn_settings,
)
from dense import GRANITE, granite_settings
from mixtures import EXPERTS, MIXTURE, SIGMOID, SOFTMAX, gating

if TYPE_CHECKING:
    from torch import Tensor

WINDOW = 24
GEMMA: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 128, "head_dim": 32, "rms_norm_eps": 1e-6}
# llama.cpp looks GELU up in a table of half-precision values; this keeps its rounding error small.
SOFT_GELU: dict[str, Any] = {
    "gains": {"post_feedforward_layernorm.weight": 0.025},
    "means": {"post_feedforward_layernorm.weight": -0.9},
    "tolerance": 3e-4,
}


def sinks(name: str, tensor: Tensor, _config: Any) -> Parts:
    yield (f"blk.{layer(name)}.attn_sinks.weight" if name.endswith("sinks") else name), tensor


def afmoe_settings(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        **expert_settings(model),
        **window_settings(model),
        "leading_dense_block_count": config.num_dense_layers,
        "expert_weights_norm": True,
        "expert_weights_scale": config.route_scale,
    }


def mimo_settings(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "attention.value_length": config.v_head_dim,
        "attention.head_count_kv": [
            config.num_key_value_heads * (2 if kind == "sliding_attention" else 1) for kind in config.layer_types
        ],
        "attention.value_scale": config.attention_value_scale,
        "rope.freq_base_swa": config.rope_parameters["sliding_attention"]["rope_theta"],
    }


def llama4_settings(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "interleave_moe_layer_step": config.interleave_moe_layer_step,
        "feed_forward_length": config.intermediate_size_mlp,
        "expert_feed_forward_length": config.intermediate_size,
    }


def llama4_tensors(name: str, tensor: Tensor, _config: Any) -> Parts:
    """Convert experts' matrices, stored as [n_in, n_out]."""
    if name.endswith("experts.gate_up_proj"):
        gate, up = tensor.transpose(1, 2).chunk(2, dim=1)
        yield f"blk.{layer(name)}.ffn_gate_exps.weight", gate
        yield f"blk.{layer(name)}.ffn_up_exps.weight", up
    elif name.endswith("experts.down_proj"):
        yield f"blk.{layer(name)}.ffn_down_exps.weight", tensor.transpose(1, 2)
    else:
        yield name, tensor


def gemma2_settings(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "attention.sliding_window": config.sliding_window,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }


def window_alone(model: Any) -> dict[str, Any]:
    """For architectures whose windowed layers are known to llama.cpp."""
    return {"attention.sliding_window": model.config.sliding_window}


def cohere2_settings(model: Any) -> dict[str, Any]:
    return {**window_alone(model), "logit_scale": model.config.logit_scale, "rope.scaling.type": "none"}


def gpt_oss_tensors(name: str, tensor: Tensor, _config: Any) -> Parts:
    """Convert experts with interleaved gate and up projections, and matrices stored as [n_in, n_out]."""
    if "experts.gate_up_proj" in name:
        kind = "bias" if name.endswith("_bias") else "weight"
        turned = tensor if kind == "bias" else tensor.transpose(1, 2)
        yield f"blk.{layer(name)}.ffn_gate_exps.{kind}", turned[:, ::2]
        yield f"blk.{layer(name)}.ffn_up_exps.{kind}", turned[:, 1::2]
    elif name.endswith("experts.down_proj_bias"):
        yield f"blk.{layer(name)}.ffn_down_exps.bias", tensor
    elif name.endswith("experts.down_proj"):
        yield f"blk.{layer(name)}.ffn_down_exps.weight", tensor.transpose(1, 2)
    elif name.endswith("sinks"):
        yield f"blk.{layer(name)}.attn_sinks.weight", tensor
    else:
        yield name, tensor


ARCHITECTURES = (
    Architecture(
        "gemma2",
        "gemma2",
        {
            **GEMMA,
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
        },
        gemma2_settings,
        one_added_to_norms,
        **SOFT_GELU,
        n_window=WINDOW,
    ),
    Architecture(
        "gemma3",
        "gemma3_text",
        {**GEMMA, "num_hidden_layers": 7, "sliding_window": WINDOW, "query_pre_attn_scalar": 32},
        window_alone,
        one_added_to_norms,
        **SOFT_GELU,
        n_window=WINDOW,
    ),
    Architecture(
        "cohere2",
        "cohere2",
        {"num_hidden_layers": 4, "sliding_window": WINDOW, "logit_scale": 1.5},
        cohere2_settings,
        n_window=WINDOW,
    ),
    Architecture(
        "olmo2 (OLMo 3)", "olmo3", {"num_hidden_layers": 4, "sliding_window": WINDOW}, window_settings, n_window=WINDOW
    ),
    Architecture(
        "gpt-oss",
        "gpt_oss",
        {
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        together(window_alone, expert_settings),
        gpt_oss_tensors,
        n_window=WINDOW,
    ),
    Architecture(
        "gpt-oss (YaRN)",
        "gpt_oss",
        {
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": True,
                "original_max_position_embeddings": 128,
            },
        },
        together(window_alone, expert_settings, yarn_settings),
        gpt_oss_tensors,
        n_window=WINDOW,
    ),
    Architecture(
        "afmoe",
        "afmoe",
        {
            **EXPERTS,
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "num_experts": 4,
            "num_shared_experts": 1,
            "route_scale": 1.5,
            "mup_enabled": True,
            "global_attn_every_n_layers": 4,
        },
        afmoe_settings,
        MIXTURE,
        n_window=WINDOW,
        row_scale=8.0,
    ),
    Architecture(
        "exaone-moe",
        "exaone_moe",
        {**EXPERTS, "num_hidden_layers": 4, "sliding_window": WINDOW, "num_experts": 4, "routed_scaling_factor": 1.5},
        together(expert_settings, window_settings, gating(SIGMOID)),
        MIXTURE,
        n_window=WINDOW,
    ),
    Architecture(
        "cohere2moe",
        "cohere2_moe",
        {**EXPERTS, "num_hidden_layers": 4, "sliding_window": WINDOW, "num_experts": 4, "logit_scale": 1.5},
        together(
            expert_settings,
            cohere2_settings,
            gating(SOFTMAX),
            window_settings,
            lambda model: {
                "leading_dense_block_count": 0,
                "expert_feed_forward_length": model.config.intermediate_size,
            },
        ),
        chain(MIXTURE, renamed((r"model\.layers\.(\d+)\.mlp\.gate\.", r"blk.\1.ffn_gate_inp."))),
        named_as="cohere2",
        n_window=WINDOW,
    ),
    Architecture(
        "mellum",
        "mellum",
        {
            **EXPERTS,
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "num_local_experts": 4,
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": 10_000.0}
                for kind in ("full_attention", "sliding_attention")
            },
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
        together(expert_settings, window_settings),
        MIXTURE,
        named_as="qwen3moe",
        n_window=WINDOW,
    ),
    Architecture(
        "granite_swa",
        "granite_swa",
        {**GRANITE, "num_hidden_layers": 4, "sliding_window": WINDOW},
        together(granite_settings, window_settings),
        chain(rotary_neighbours, sinks),
        named_as="granite",
        n_window=WINDOW,
        row_scale=GRANITE["embedding_multiplier"],
    ),
    Architecture(
        "mimo2",
        "mimo_v2_flash",
        {
            **EXPERTS,
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "n_routed_experts": 4,
            "head_dim": 48,
            "v_head_dim": 32,
        },
        together(expert_settings, window_settings, gating(SIGMOID), mimo_settings),
        chain(MIXTURE, sinks),
        n_window=WINDOW,
    ),
    Architecture(
        "llama4",
        "llama4_text",
        {"num_hidden_layers": 4, "num_local_experts": 4, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2},
        llama4_settings,
        llama4_tensors,
    ),
)
