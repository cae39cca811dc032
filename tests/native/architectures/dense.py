"""Dense models with RMSNorm, gated feed-forward layers and full causal attention."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from architecture import Architecture, Parts, head_size
from conversion import layer, left_out, one_added_to_norms, rotary_neighbours, yarn_settings

if TYPE_CHECKING:
    from torch import Tensor


def llama3_frequencies(model: Any) -> dict[str, Tensor]:
    """Divisors of the rotary frequencies, as transformers computes them for Llama 3.1 (arXiv:2407.21783)."""
    import torch

    config, rope = model.config, model.config.rope_parameters
    base, n = rope["rope_theta"], rope["original_max_position_embeddings"]
    low, high = n / rope["low_freq_factor"], n / rope["high_freq_factor"]
    factors = []
    for i in range(0, head_size(config), 2):
        length = 2 * math.pi * base ** (i / head_size(config))
        smooth = (n / length - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        factors.append(1.0 if length < high else rope["factor"] if length > low else between)
    return {"rope_freqs.weight": torch.tensor(factors)}


def granite_settings(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "attention.scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": config.logits_scaling,
    }


GRANITE = {
    "embedding_multiplier": 6.0,
    "logits_scaling": 1.5,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.2,
}


def xielu_settings(model: Any) -> dict[str, Any]:
    """The activation's parameters, a number per layer (Huang and Schlag 2024, arXiv:2411.13010)."""
    layers = [block.mlp.act_fn for block in model.model.layers]
    names = ("alpha_p", "alpha_n", "beta", "eps")
    return {f"xielu.{name}": [getattr(layer, name).item() for layer in layers] for name in names}


def mistral3_settings(model: Any) -> dict[str, Any]:
    rope = model.config.rope_parameters
    return {
        **yarn_settings(model),
        "rope.scaling.yarn_log_multiplier": rope["mscale_all_dim"],
        "attention.temperature_scale": rope["llama_4_scaling_beta"],
    }


MISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}


def sections(model: Any) -> dict[str, Any]:
    """Numbers of rotary frequencies for time, height and width; for text these positions are equal."""
    return {"rope.dimension_sections": [*model.config.rope_parameters["mrope_section"], 0]}


def in_a_model(name: str, tensor: Tensor, _config: Any) -> Parts:
    yield f"model.{name}", tensor


def hrm_settings(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "block_count": config.num_layers_per_stack * config.H_cycles * (config.L_cycles + 1),
        "embedding_scale": config.embedding_scale,
        "hrm.layers_per_stack": config.num_layers_per_stack,
        "hrm.h_cycles": config.H_cycles,
        "hrm.l_cycles": config.L_cycles,
        "hrm.prefix_lm": False,
    }


def hrm_tensors(name: str, tensor: Tensor, config: Any) -> Parts:
    """The low stack's layers, then the high stack's."""
    if name == "model.z_L_init":
        yield "hrm.z_l_init", tensor
        return
    for stack, first in (("L", 0), ("H", config.num_layers_per_stack)):
        if name.startswith(f"model.{stack}_module."):
            name = f"model.layers.{layer(name) + first}." + name.split(".", 4)[4]
            name = re.sub(r"model\.layers\.(\d+)\.self_attn\.gate_proj", r"blk.\1.attn_gate", name)
    yield name, tensor


ARCHITECTURES = (
    Architecture("llama", "llama", tensors=rotary_neighbours),
    Architecture(
        "llama (Llama 3)",
        "llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
        tensors=rotary_neighbours,
        extra=llama3_frequencies,
    ),
    Architecture("llama (Mistral)", "mistral", {"sliding_window": None}, tensors=rotary_neighbours),
    Architecture("qwen2", "qwen2"),
    Architecture("qwen3", "qwen3"),
    Architecture(
        "smollm3", "smollm3", {"num_hidden_layers": 5, "no_rope_layer_interval": 4}, tensors=rotary_neighbours
    ),
    Architecture("arcee", "arcee", tensors=rotary_neighbours),
    Architecture("ernie4_5", "ernie4_5"),
    Architecture("seed_oss", "seed_oss", {"attention_bias": True}),
    Architecture("hunyuan-dense", "hunyuan_v1_dense"),
    Architecture(
        "granite",
        "granite",
        GRANITE,
        granite_settings,
        tensors=rotary_neighbours,
        row_scale=GRANITE["embedding_multiplier"],
    ),
    Architecture(
        "olmo", "olmo", settings=lambda _model: {"attention.layer_norm_epsilon": 1e-5}, tensors=rotary_neighbours
    ),
    Architecture("olmo2", "olmo2"),
    Architecture("glm4", "glm4"),
    Architecture("exaone4", "exaone4", {"sliding_window": None}),
    Architecture(
        "apertus",
        "apertus",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
        xielu_settings,
        left_out(".alpha_p", ".alpha_n", ".beta", ".eps"),
        gains={"down_proj.weight": 0.3},
    ),
    Architecture("mistral3", "ministral3", {"rope_parameters": MISTRAL3_ROPE}, mistral3_settings, rotary_neighbours),
    Architecture(
        "gemma",
        "gemma",
        {"hidden_size": 96, "intermediate_size": 128, "head_dim": 32, "tie_word_embeddings": True},
        tensors=one_added_to_norms,
        gains={"mlp.down_proj.weight": 0.1},  # see layer_norm.SMALL_MLP
        tolerance=3e-4,
    ),
    Architecture("phi3", "phi3", {"sliding_window": None}),
    Architecture(
        "hrm_text",
        "hrm_text",
        {
            "num_key_value_heads": None,
            "num_hidden_layers": None,
            "num_layers_per_stack": 2,
            "H_cycles": 2,
            "L_cycles": 2,
            "embedding_scale": 8.0,
            "prefix_lm": False,
        },
        hrm_settings,
        hrm_tensors,
        row_scale=8.0,
        named_as="llama",
    ),
    Architecture(
        "qwen2vl",
        "qwen2_vl_text:Qwen2VLTextModel",
        {
            "head_dim": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [3, 3, 2]},
        },
        sections,
        in_a_model,
    ),
    Architecture(
        "qwen3vl",
        "qwen3_vl_text:Qwen3VLTextModel",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [3, 3, 2]}},
        lambda model: {**sections(model), "n_deepstack_layers": 0},
        in_a_model,
    ),
)
