"""Writes a random transformers model as a .gguf file, by the rules of llama.cpp's converter.

Names of tensors come from the gguf package's own map, keys from its writer. What a converter does
to values (reordered rows, shifted norms, stacked experts, divisors of rotation) is written here a
second time, independently of the engine's reader.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float32]

# Of these the converter reorders queries and keys.
REORDERED = ("llama", "granite", "smollm3")
_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(\w+)\.weight")
_EXPERT_PARTS = {
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
    "w1": "ffn_gate_exps",
    "w3": "ffn_up_exps",
    "w2": "ffn_down_exps",
}


def write_gguf_model(
    path: Path, arch: str, config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> Path:
    """`config` and `weights` are those of the folder that transformers wrote."""
    writer = gguf.GGUFWriter(path, arch)
    _add_keys(writer, arch, config)
    for name, array in sorted(_tensors(arch, config, weights).items()):
        writer.add_tensor(name, np.ascontiguousarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}
    return rope.get("full_attention", rope)


def _head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _add_keys(writer: gguf.GGUFWriter, arch: str, config: Mapping[str, Any]) -> None:
    rope, head_dim = _rope(config), _head_dim(config)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if "original_max_position_embeddings" in rope and rope["rope_type"] != "llama3":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "longrope":
        original = rope["original_max_position_embeddings"]
        scale = config["max_position_embeddings"] / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
    for key, add in (
        ("num_local_experts", writer.add_expert_count),
        ("num_experts", writer.add_expert_count),
        ("num_experts_per_tok", writer.add_expert_used_count),
        ("moe_intermediate_size", writer.add_expert_feed_forward_length),
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ("attention_multiplier", writer.add_attention_scale),
        ("embedding_multiplier", writer.add_embedding_scale),
        ("residual_multiplier", writer.add_residual_scale),
        ("logits_scaling", writer.add_logit_scale),
    ):
        if config.get(key) is not None:
            add(config[key])
    if arch in ("gemma2", "gemma3", "phi3", "llama") and config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])


def _tensors(
    arch: str, config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> dict[str, Array]:
    """GGUF name -> values, outermost dimension first."""
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    made: dict[str, Array] = {}
    experts: dict[str, dict[int, Array]] = {}
    packed: dict[str, list[Array]] = {}
    for name, tensor in weights.items():
        array = tensor.float().numpy()
        match = _EXPERT.fullmatch(name)
        if match:
            layer = re.search(r"layers\.(\d+)", name)
            assert layer
            target = f"blk.{layer[1]}.{_EXPERT_PARTS[match[3]]}.weight"
            experts.setdefault(target, {})[int(match[2])] = array
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target, f"the gguf package knows no name for {name}"
        if arch in REORDERED and ("attn_q." in target or "attn_k." in target):
            key = "num_attention_heads" if "attn_q." in target else "num_key_value_heads"
            array = _reordered(array, config[key])
        if arch.startswith("gemma") and target.endswith("norm.weight"):
            array = array + 1
        if arch == "chatglm" and re.search(r"attn_[qkv]\.", target):
            packed.setdefault(re.sub("attn_[qkv]", "attn_qkv", target), []).append(array)
            continue
        made[target] = array
    for target, parts in experts.items():
        made[target] = np.stack([parts[number] for number in sorted(parts)])
    for target, arrays in packed.items():  # k, q, v in order of names
        made[target] = np.concatenate([arrays[1], arrays[0], arrays[2]])
    return made | _divisors(config)


def _reordered(array: Array, heads: int) -> Array:
    """The two halves of each head, one value of each in turn."""
    rows = array.shape[0] // heads // 2
    return array.reshape(heads, 2, rows, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _divisors(config: Mapping[str, Any]) -> dict[str, Array]:
    rope = _rope(config)
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32)
            for kind in ("short", "long")
        }
    if rope["rope_type"] != "llama3":
        return {}
    dim, original = _head_dim(config), rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    made: list[float] = []
    for exponent in range(0, dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (exponent / dim)
        if wavelength < original / high:
            made.append(1.0)
        elif wavelength > original / low:
            made.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            made.append(1 / ((1 - smooth) / factor + smooth))
    return {"rope_freqs.weight": np.array(made, np.float32)}
