"""Mixtures of experts with full causal attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from architecture import Architecture, Parts
from conversion import chain, expert_settings, layer, renamed, rotary_neighbours, split_experts, together, yarn_settings
from dense import GRANITE, MISTRAL3_ROPE, granite_settings

if TYPE_CHECKING:
    from torch import Tensor

SOFTMAX, SIGMOID = 1, 2  # codes of the router's activation in a file
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK: dict[str, Any] = {
    **EXPERTS,
    "num_key_value_heads": 4,
    "head_dim": None,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}
DEEPSEEK_YARN = {**MISTRAL3_ROPE, "mscale": 0.7, "mscale_all_dim": 0.7}


def correction_bias(name: str, tensor: Tensor, _config: Any) -> Parts:
    """Rename the bias that is added to experts' scores in the selection, but not in the weighting."""
    if name.endswith(("correction_bias", "expert_bias")):
        yield f"blk.{layer(name)}.exp_probs_b.bias", tensor.flatten()
    else:
        yield name, tensor


def latent_attention(name: str, tensor: Tensor, config: Any) -> Parts:
    """Split the matrix that expands keys and values in multi-head latent attention (arXiv:2405.04434)."""
    if name.endswith("kv_b_proj.weight"):
        heads = tensor.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
        keys, values = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        yield f"blk.{layer(name)}.attn_k_b.weight", keys.transpose(1, 2)
        yield f"blk.{layer(name)}.attn_v_b.weight", values
    else:
        yield name, tensor


def latent_settings(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim,
    }


def gating(kind: int) -> Any:
    return lambda _model: {"expert_gating_func": kind}


def ernie_settings(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "expert_count": config.moe_num_experts,
        "expert_used_count": config.moe_k,
        "expert_shared_count": config.moe_num_shared_experts,
        "expert_shared_feed_forward_length": config.moe_num_shared_experts * config.moe_intermediate_size,
        "interleave_moe_layer_step": config.moe_layer_interval,
        "leading_dense_block_count": config.moe_layer_start_index,
    }


MIXTURE = chain(split_experts, correction_bias)
ARCHITECTURES = (
    Architecture(
        "llama (Mixtral)",
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        tensors=chain(rotary_neighbours, split_experts, renamed((r"mlp\.gate", "block_sparse_moe.gate"))),
    ),
    Architecture(
        "qwen2moe",
        "qwen2_moe",
        {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 64},
        expert_settings,
        MIXTURE,
    ),
    Architecture(
        "qwen3moe", "qwen3_moe", {**EXPERTS, "num_local_experts": 4, "norm_topk_prob": True}, expert_settings, MIXTURE
    ),
    Architecture(
        "olmoe",
        "olmoe",
        {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4},
        expert_settings,
        MIXTURE,
    ),
    Architecture(
        "granitemoe",
        "granitemoe",
        {**GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2},
        together(granite_settings, expert_settings),
        chain(rotary_neighbours, MIXTURE, renamed((r"router\.weight", "router.layer.weight"))),
        row_scale=GRANITE["embedding_multiplier"],
    ),
    Architecture(
        "glm4moe",
        "glm4_moe",
        {**EXPERTS, "n_routed_experts": 4, "num_nextn_predict_layers": 0, "routed_scaling_factor": 1.5},
        together(expert_settings, gating(SIGMOID)),
        MIXTURE,
    ),
    Architecture(
        "ernie4_5-moe",
        "ernie4_5_moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1},
        together(expert_settings, ernie_settings),
        MIXTURE,
    ),
    Architecture(
        "hunyuan-moe",
        "hunyuan_v1_moe",
        {"num_experts": 4, "moe_topk": 2},
        together(expert_settings, lambda _model: {"expert_used_count": 2}),
        MIXTURE,
    ),
    Architecture(
        "dots1",
        "dots1",
        {
            **EXPERTS,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.5,
        },
        together(expert_settings, gating(SIGMOID)),
        MIXTURE,
    ),
    Architecture(
        "minimax-m2",
        "minimax_m2",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        together(expert_settings, gating(SIGMOID)),
        MIXTURE,
    ),
    Architecture(
        "hy_v3",
        "hy_v3",
        {**EXPERTS, "num_experts": 4, "num_shared_experts": 1, "router_scaling_factor": 1.5},
        together(
            expert_settings,
            gating(SIGMOID),
            lambda model: {"expert_weights_scale": model.config.router_scaling_factor, "expert_weights_norm": True},
        ),
        chain(MIXTURE, renamed((r"exp_probs_b\.bias", "exp_probs_b"))),
        named_as="dots1",
    ),
    Architecture(
        "deepseek2 (V2)",
        "deepseek_v2",
        {**DEEPSEEK, "routed_scaling_factor": 1.5},
        together(expert_settings, latent_settings),
        chain(MIXTURE, latent_attention),
    ),
    Architecture(
        "deepseek2 (V3)",
        "deepseek_v3",
        {**DEEPSEEK, "norm_topk_prob": True},
        together(expert_settings, latent_settings, gating(SIGMOID)),
        chain(MIXTURE, latent_attention),
    ),
    Architecture(
        "deepseek2 (YaRN)",
        "deepseek_v3",
        {**DEEPSEEK, "norm_topk_prob": True, "rope_parameters": DEEPSEEK_YARN},
        together(
            expert_settings,
            latent_settings,
            gating(SIGMOID),
            yarn_settings,
            lambda _model: {"rope.scaling.yarn_log_multiplier": 0.1 * 0.7},
        ),
        chain(MIXTURE, latent_attention),
    ),
    Architecture(
        "mistral4",
        "mistral4:Mistral4ForCausalLM",
        {
            **DEEPSEEK,
            "norm_topk_prob": True,
            "rope_parameters": {**MISTRAL3_ROPE, "partial_rotary_factor": 0.5},
            "head_dim": 64,
            "first_k_dense_replace": 0,
        },
        together(
            expert_settings,
            latent_settings,
            yarn_settings,
            lambda _model: {
                "rope.scaling.yarn_log_multiplier": 0.1,
                "attention.temperature_scale": 0.5,
                "attention.temperature_length": 128,
            },
        ),
        chain(MIXTURE, latent_attention),
    ),
)
