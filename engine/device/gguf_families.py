"""Each GGUF architecture -> config.json of the family it came from, and what its tensors are.

Owns the tables. The metadata says less than config.json does: what llama.cpp knows by the name of
the architecture is written here. Where a convention matters:

- llama, granite, smollm3 (and mistral and mixtral, which are called llama): rows of queries and
  keys are reordered for interleaved rotation, in which the others' files come as published.
- gemma: norm weights are stored with the 1 already added that the model adds to them.
- phi3, glm4, chatglm: gate and up are one tensor, ffn_up.
- Attention scales of Gemma 2 and 3 follow from the head size, except in the 27B models.
- Rotation scaled as in Llama 3.1 is a tensor of divisors, longrope two of them.

Sources: the tensor names of the gguf package, the key names of the GGUF specification.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from engine.config import ModelError
from engine.gguf import GgufHeader, Value

Config = dict[str, Any]
Names = Mapping[str, str | tuple[str, ...]]

GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_PREFIX = "model.layers.{}."
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")

_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_PACKED_MLP = {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}
_PRE_NORM = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_POST_NORM = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GLM_QKV = {"attn_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}

_LLAMA: Names = _ATTENTION | _MLP | _PRE_NORM
_MIXTRAL: Names = {
    **_ATTENTION,
    **_PRE_NORM,
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
_QWEN3_MOE: Names = {
    **_ATTENTION,
    **_QK_NORM,
    **_PRE_NORM,
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_PHI3: Names = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    **_PACKED_MLP,
    **_PRE_NORM,
}
_GEMMA2: Names = {**_LLAMA, **_POST_NORM, "ffn_norm": "pre_feedforward_layernorm"}
_GLM: Names = {**_ATTENTION, **_GLM_QKV, **_PACKED_MLP, **_PRE_NORM}
_GLM4: Names = {
    **_GLM,
    "post_attention_norm": "post_self_attn_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
}

# Keys that change the arithmetic in ways that no family here has.
_UNKNOWN_KEYS = (
    "rope.dimension_sections",
    "attention.max_alibi_bias",
    "attention.clamp_kqv",
    "attention.temperature_scale",
    "expert_shared_count",
    "expert_weights_scale",
)


class Fields:
    """Typed reads of one file's metadata below its architecture's name. Errors name the key."""

    def __init__(self, path: Path, header: GgufHeader) -> None:
        self.path = path
        self.shapes = {tensor.name: tensor.shape for tensor in header.tensors}
        self._metadata = header.metadata
        self.family = str(header.metadata.get("general.architecture", ""))

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. Per-layer values must be equal."""
        value = self._get(key)
        if value is None:
            if default is None:
                raise ModelError(f"{self.path}: GGUF key {self.family}.{key} is missing")
            return default
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise self.wrong(key, "a number, equal for all layers")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.number(key, default)
        if not isinstance(value, int) or value <= 0:
            raise self.wrong(key, "a positive integer")
        return value

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._get(key)
        if not isinstance(value, str | None):
            raise self.wrong(key, "a text")
        return default if value is None else value

    def has(self, key: str) -> bool:
        """The key is there and not 0."""
        return bool(self._metadata.get(f"{self.family}.{key}"))

    def raw(self, key: str) -> Value | None:
        """The value as it is."""
        return self._metadata.get(f"{self.family}.{key}")

    def wrong(self, key: str, wanted: str) -> ModelError:
        """The error for a value of the wrong kind."""
        return ModelError(
            f"{self.path}: GGUF key {self.family}.{key} must be {wanted}, it is {self.raw(key)!r}"
        )

    def _get(self, key: str) -> Value | None:
        value = self.raw(key)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            return value[0]
        return value


class GgufFamily(NamedTuple):
    """`names` are those of a layer's tensors without number and suffix: "{}" is filled with the
    number of an expert, a tuple names the queries, keys and values of one packed tensor.
    """

    architecture: str
    names: Names
    extra: Callable[[Fields, Config], Config] = lambda _fields, _config: {}
    interleaved: bool = False
    windowed: bool = False


def family_of(fields: Fields) -> GgufFamily:
    """Raises `ModelError` naming an unknown architecture."""
    if fields.family == "llama":
        if fields.has("expert_count"):
            return _MIXTRAL_FAMILY
        if fields.has("attention.sliding_window"):
            return _FAMILIES["llama"]._replace(
                architecture="MistralForCausalLM", extra=_window, windowed=True
            )
    family = _FAMILIES.get(fields.family)
    if family is None:
        raise ModelError(
            f"{fields.path}: GGUF architecture {fields.family!r} is not supported "
            f"({', '.join(sorted(_FAMILIES))} are)"
        )
    return family


def config_of(fields: Fields, family: GgufFamily) -> Config:
    """The file's metadata under the keys of config.json; rope divisors in tensors are not read.

    Raises `ModelError` naming a key that is missing, of the wrong kind or not supported.
    """
    _refuse_unknown(fields, family)
    hidden, heads = fields.size("embedding_length"), fields.size("attention.head_count")
    head_dim = fields.size("attention.key_length", hidden // heads or None)
    if fields.size("attention.value_length", head_dim) != head_dim:
        raise fields.wrong("attention.value_length", f"{head_dim}, the length of keys")
    layers = {name.split(".")[1] for name in fields.shapes if name.startswith("blk.")}
    if fields.size("block_count") > len(layers):
        raise fields.wrong("block_count", f"at most {len(layers)}, the layers in the file")
    embedding = fields.shapes.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise ModelError(f"{fields.path}: tensor token_embd.weight is missing or has no two sides")
    config: Config = {
        "architectures": [family.architecture],
        "hidden_size": hidden,
        "num_hidden_layers": fields.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.size("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": embedding[1],
        "tie_word_embeddings": "output.weight" not in fields.shapes,
        "attention_bias": _any_bias(fields, ("attn_q", "attn_qkv", "attn_output")),
        "mlp_bias": _any_bias(fields, ("ffn_up", "ffn_down")),
        "rope_interleaved": family.interleaved,
        **_rope(fields, head_dim),
    }
    if not fields.has("expert_count") or fields.has("feed_forward_length"):
        config["intermediate_size"] = fields.size("feed_forward_length")
    return {**config, **family.extra(fields, config)}


def _refuse_unknown(fields: Fields, family: GgufFamily) -> None:
    for key in _UNKNOWN_KEYS:
        if fields.has(key) and fields.raw(key) != 1.0:
            raise ModelError(
                f"{fields.path}: GGUF key {fields.family}.{key} {fields.raw(key)!r} is not "
                "supported"
            )
    key = "attention.sliding_window"
    if family.windowed or not fields.has(key):
        return
    if fields.size(key) < fields.size("context_length"):
        raise ModelError(
            f"{fields.path}: GGUF key {fields.family}.{key} {fields.raw(key)!r} is not supported "
            "in a model of this architecture"
        )


def _any_bias(fields: Fields, parts: tuple[str, ...]) -> bool:
    return any(f"blk.0.{part}.bias" in fields.shapes for part in parts)


def _rope(fields: Fields, head_dim: int) -> Config:
    """Base, rotated share of a head, and scaling."""
    dim = fields.size("rope.dimension_count", head_dim)
    if dim > head_dim:
        raise fields.wrong("rope.dimension_count", f"at most {head_dim}, the size of a head")
    share = dim / head_dim
    if int(head_dim * share) != dim:  # the reader multiplies again and cuts
        share = math.nextafter(share, 2.0)
    config: Config = {
        "rope_theta": fields.number("rope.freq_base", 10000.0),
        "partial_rotary_factor": share,
    }
    original = fields.size("rope.scaling.original_context_length", fields.size("context_length"))
    sharpness = fields.number("rope.scaling.attn_factor", 1.0)
    if "rope_factors_long.weight" in fields.shapes:
        config["original_max_position_embeddings"] = original
        config["rope_scaling"] = {"rope_type": "longrope", "attention_factor": sharpness}
        return config
    kind = fields.text("rope.scaling.type", "none")
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    if fields.has("rope.scale_linear"):
        kind = "linear"
    match kind:
        case "none":
            pass
        case "linear":
            config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
        case "yarn":
            config["rope_scaling"] = {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
                "beta_fast": fields.number("rope.scaling.yarn_beta_fast", 32.0),
                "beta_slow": fields.number("rope.scaling.yarn_beta_slow", 1.0),
                "attention_factor": sharpness * (0.1 * math.log(max(factor, 1.0)) + 1.0),
            }
        case _:
            raise fields.wrong("rope.scaling.type", "none, linear or yarn")
    return config


def _window(fields: Fields, _config: Config) -> Config:
    key = "attention.sliding_window"
    return {"sliding_window": fields.size(key)} if fields.has(key) else {}


def _mixtral(fields: Fields, _config: Config) -> Config:
    return {
        "num_local_experts": fields.size("expert_count"),
        "num_experts_per_tok": fields.size("expert_used_count"),
    }


def _qwen3_moe(fields: Fields, config: Config) -> Config:
    ffn_size = fields.size("expert_feed_forward_length")
    return {
        "num_experts": fields.size("expert_count"),
        "num_experts_per_tok": fields.size("expert_used_count"),
        "moe_intermediate_size": ffn_size,
        "intermediate_size": config.get("intermediate_size", ffn_size),
        "norm_topk_prob": True,
    }


def _gemma(_fields: Fields, _config: Config) -> Config:
    return {"norm_weight_offset": 0.0}


def _gemma2(fields: Fields, config: Config) -> Config:
    """A file that lacks a soft cap means the published model's own, as in the family's reader."""
    softcaps = {
        name: fields.number(key)
        for key, name in (
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        )
        if fields.raw(key) is not None
    }
    scalar = config["head_dim"]
    if (fields.family, config["num_hidden_layers"]) in (("gemma2", 46), ("gemma3", 62)):  # 27B
        scalar = config["hidden_size"] // config["num_attention_heads"]
    return {
        "norm_weight_offset": 0.0,
        "query_pre_attn_scalar": scalar,
        **softcaps,
        **_window(fields, config),
    }


def _gemma3(fields: Fields, config: Config) -> Config:
    key = "attention.sliding_window_pattern"
    pattern = fields.raw(key)
    extra = {
        **_gemma2(fields, config),
        "rope_local_base_freq": fields.number("rope.freq_base_swa", 10000.0),
    }
    if isinstance(pattern, list):
        return {
            **extra,
            "layer_types": ["sliding_attention" if on else "full_attention" for on in pattern],
        }
    return {**extra, "sliding_window_pattern": fields.size(key, 6)}


def _granite(fields: Fields, config: Config) -> Config:
    return {
        "attention_multiplier": fields.number("attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": fields.number("embedding_scale", 1.0),
        "residual_multiplier": fields.number("residual_scale", 1.0),
        "logits_scaling": fields.number("logit_scale", 1.0),
    }


_MIXTRAL_FAMILY = GgufFamily("MixtralForCausalLM", _MIXTRAL, _mixtral, interleaved=True)
_FAMILIES = {
    "llama": GgufFamily("LlamaForCausalLM", _LLAMA, interleaved=True),
    "qwen2": GgufFamily("Qwen2ForCausalLM", _LLAMA),
    "qwen3": GgufFamily("Qwen3ForCausalLM", {**_LLAMA, **_QK_NORM}),
    "qwen3moe": GgufFamily("Qwen3MoeForCausalLM", _QWEN3_MOE, _qwen3_moe),
    "phi3": GgufFamily("Phi3ForCausalLM", _PHI3, _window, windowed=True),
    "gemma": GgufFamily("GemmaForCausalLM", _LLAMA, _gemma),
    "gemma2": GgufFamily("Gemma2ForCausalLM", _GEMMA2, _gemma2, windowed=True),
    "gemma3": GgufFamily("Gemma3ForCausalLM", {**_GEMMA2, **_QK_NORM}, _gemma3, windowed=True),
    "granite": GgufFamily("GraniteForCausalLM", _LLAMA, _granite, interleaved=True),
    "olmo2": GgufFamily("Olmo2ForCausalLM", {**_ATTENTION, **_QK_NORM, **_MLP, **_POST_NORM}),
    "smollm3": GgufFamily("SmolLM3ForCausalLM", _LLAMA, interleaved=True),
    "glm4": GgufFamily("Glm4ForCausalLM", _GLM4),
    "chatglm": GgufFamily("GlmForCausalLM", _GLM),
}
