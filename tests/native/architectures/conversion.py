"""Conversion of a transformers model to a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import gguf
import tiny_gguf
from architecture import Architecture, Parts, common_settings, find, head_size

if TYPE_CHECKING:
    from torch import Tensor

Step = Callable[[str, "Tensor", Any], Parts]
Weights = Literal["f32", "f16", "q8_0"]


def write(path: Path, architecture: Architecture, model: Any, weights: Weights = "f32") -> Path:
    """Write ``model`` to ``path`` and return it. The file does not declare the type of its matrices."""
    writer = gguf.GGUFWriter(path, architecture.gguf)
    writer.add_name("tiny")  # not the architecture: by the model's name, llama.cpp assumes Phi-3's special tokens
    settings = {**common_settings(model.config), **architecture.settings(model)}
    for name, value in settings.items():
        if value is not None:
            add_setting(writer, name if name.startswith("xielu.") else f"{architecture.gguf}.{name}", value)
    tiny_gguf.add_tokenizer(writer, tiny_gguf.TinyModel("llama", "bpe", pre="smollm", add_bos=False))
    matrices = tiny_gguf.TYPES[weights]
    for name, values in tensors(architecture, model).items():
        is_matrix = values.ndim > 1 and name.endswith(".weight")  # experts' biases have two dimensions
        kind = matrices if is_matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(values.numpy(), kind), raw_dtype=kind)
    tiny_gguf.close(writer)
    return path


def add_setting(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    """Add a setting of the type that GGUF has for a Python value."""
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(name, value)


def is_tied(model: Any) -> bool:
    """Whether the output layer is the embedding table, also if the model has no output layer."""
    head = model.get_output_embeddings()
    return head is None or head.weight is model.get_input_embeddings().weight


def tensors(architecture: Architecture, model: Any) -> dict[str, Tensor]:
    """The file's float32 tensors by name, matrices as [n_out, n_in]."""
    names = architecture.tensor_names
    tied = is_tied(model)
    found: dict[str, Tensor] = dict(architecture.extra(model))
    for name, values in model.state_dict().items():
        if tied and name.startswith(("lm_head", "embed_out")):
            continue
        for part, tensor in architecture.tensors(name, values, model.config):
            in_file = part if part.startswith(("blk.", "hrm.")) else names.get_name(part, (".weight", ".bias"))
            if in_file is None:
                raise ValueError(f"{architecture.name}: no name in the file for {part}")
            found[in_file] = tensor.detach().float().contiguous()
    return found


# --- steps of several architectures ---------------------------------------------------------------------------------


def chain(*steps: Step) -> Step:
    """Compose steps."""

    def run(name: str, tensor: Tensor, config: Any) -> Parts:
        parts = [(name, tensor)]
        for step in steps:
            parts = [made for part, values in parts for made in step(part, values, config)]
        return parts

    return run


def layer(name: str) -> int:
    """Number of the layer that a parameter belongs to."""
    found = re.search(r"\.(\d+)\.", name)
    assert found is not None, name
    return int(found[1])


def renamed(*pairs: tuple[str, str]) -> Step:
    """Rename parameters whose names `gguf` does not know: pairs of a regular expression and a replacement."""

    def rename(name: str, tensor: Tensor, _config: Any) -> Parts:
        for pattern, other in pairs:
            name = re.sub(pattern, other, name)
        yield name, tensor

    return rename


def left_out(*ends: str) -> Step:
    """Drop parameters that the file does not have."""

    def leave(name: str, tensor: Tensor, _config: Any) -> Parts:
        if not name.endswith(ends):
            yield name, tensor

    return leave


def rotary_neighbours(name: str, tensor: Tensor, config: Any) -> Parts:
    """Permute Q and K for llama files: entries (2i, 2i + 1) rotate together; in transformers (i, i + d/2) do."""
    projected = re.search(r"([qk])_proj\.(weight|bias)$", name)
    if projected:
        heads = config.num_attention_heads if projected[1] == "q" else config.num_key_value_heads
        tensor = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    yield name, tensor


def one_added_to_norms(name: str, tensor: Tensor, _config: Any) -> Parts:
    """Add 1 to norms whose weights are deviations from 1."""
    yield name, tensor + 1 if name.endswith("norm.weight") else tensor


def split_experts(name: str, tensor: Tensor, _config: Any) -> Parts:
    """Split experts that transformers stores in two tensors [n_experts, n_out, n_in], gate and up projection joined."""
    if name.endswith("experts.gate_up_proj"):
        gate, up = tensor.chunk(2, dim=1)
        yield f"blk.{layer(name)}.ffn_gate_exps.weight", gate
        yield f"blk.{layer(name)}.ffn_up_exps.weight", up
    elif name.endswith("experts.down_proj"):
        yield f"blk.{layer(name)}.ffn_down_exps.weight", tensor
    else:
        yield name, tensor


def transposed(*ends: str) -> Step:
    """Transpose matrices that transformers stores as [n_in, n_out]."""

    def turn(name: str, tensor: Tensor, _config: Any) -> Parts:
        yield name, tensor.transpose(-1, -2) if name.endswith(ends) else tensor

    return turn


def joined_by_head(name: str, tensor: Tensor, config: Any) -> Parts:
    """Reorder Q, K and V: joined head by head in transformers, concatenated in the file."""
    import torch

    if "query_key_value." in name:
        heads = tensor.reshape(config.num_attention_heads, 3, head_size(config), *tensor.shape[1:])
        tensor = torch.cat([heads[:, part].reshape(-1, *tensor.shape[1:]) for part in range(3)])
    yield name, tensor


def window_settings(model: Any) -> dict[str, Any]:
    """Size of the window, and which layers have one."""
    return {
        "attention.sliding_window": model.config.sliding_window,
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in model.config.layer_types],
    }


def expert_settings(model: Any) -> dict[str, Any]:
    """Widths and selection of experts, as in most mixtures."""
    config = model.config
    width = find(config, "moe_intermediate_size", "intermediate_size")
    n_shared = find(config, "n_shared_experts", "num_shared_experts")
    shared_width = find(config, "shared_expert_intermediate_size")
    return {
        "expert_feed_forward_length": width,
        "expert_shared_count": n_shared,
        "expert_shared_feed_forward_length": shared_width or (n_shared and n_shared * width),
        "expert_weights_norm": find(config, "norm_topk_prob"),
        "expert_weights_scale": find(config, "routed_scaling_factor"),
        "expert_group_count": find(config, "n_group"),
        "expert_group_used_count": find(config, "topk_group"),
        "leading_dense_block_count": find(config, "first_k_dense_replace"),
    }


def together(*settings: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Combine settings."""
    return lambda model: {name: value for part in settings for name, value in part(model).items()}


def yarn_settings(model: Any) -> dict[str, Any]:
    """Rotary positions stretched as in Peng et al. 2023, "YaRN" (arXiv:2309.00071)."""
    rope = model.config.rope_parameters
    rope = rope.get("full_attention", rope)
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": rope["factor"],
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": rope.get("beta_fast"),
        "rope.scaling.yarn_beta_slow": rope.get("beta_slow"),
    }
