"""config.json of each family -> `ModelSpec`, by the keys that released checkpoints use.

Owns nothing, imports no torch. A value that the decoder does not implement raises `ModelError`
with the key, the value and what would be accepted: never a silently wrong model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from engine.config import ModelError
from engine.kernels.base import Activation
from engine.models.config_keys import ConfigKeys
from engine.models.rope_keys import read_rope
from engine.models.spec import ExpertsSpec, LayerSpec, ModelSpec

Reader = Callable[[Mapping[str, Any]], ModelSpec]

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

_MAX_LAYERS = 1000
_ROPE_RULES = {"auto": "auto", "base": "base", "linear": "linear"}


def llama(config: Mapping[str, Any]) -> ModelSpec:
    """Llama 1 to 3, vicuna, SmolLM2, Yi and everything else that calls itself LlamaForCausalLM."""
    keys = ConfigKeys(config)
    return _with_biases(keys, _common(keys, "llama"))


def mistral(config: Mapping[str, Any]) -> ModelSpec:
    """Mistral: a sliding window in all layers, in those that layer_types names, or in none."""
    keys = ConfigKeys(config)
    return _with_window(keys, _common(keys, "mistral"))


def mixtral(config: Mapping[str, Any]) -> ModelSpec:
    """Mixtral: Mistral with experts in each layer."""
    keys = ConfigKeys(config)
    spec = _with_window(keys, _common(keys, "mixtral", theta=1e6))
    experts = ExpertsSpec(
        num_experts=keys.size("num_local_experts"),
        top_k=keys.size("num_experts_per_tok"),
        ffn_size=spec.ffn_size,
        renormalize=True,
    )
    return _with_experts(spec, experts, [True] * len(spec.layers))


def qwen2(config: Mapping[str, Any]) -> ModelSpec:
    """Qwen2 and Qwen2.5: biases on queries, keys and values only."""
    keys = ConfigKeys(config)
    return _with_upper_window(keys, replace(_common(keys, "qwen2"), qkv_bias=True))


def qwen3(config: Mapping[str, Any]) -> ModelSpec:
    """Qwen3: norms on each head's queries and keys instead of biases."""
    keys = ConfigKeys(config)
    spec = _with_biases(keys, _common(keys, "qwen3"))
    return _with_upper_window(keys, replace(spec, qk_norm="head"))


def qwen3_moe(config: Mapping[str, Any]) -> ModelSpec:
    """Qwen3 with experts in the layers that decoder_sparse_step and mlp_only_layers leave."""
    keys = ConfigKeys(config)
    spec = replace(_with_biases(keys, _common(keys, "qwen3_moe")), qk_norm="head")
    if keys.flag("use_sliding_window"):
        spec = _with_window(keys, spec)
    step, dense = keys.size("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    experts = ExpertsSpec(
        num_experts=keys.size("num_experts", keys.size("num_local_experts", 128)),
        top_k=keys.size("num_experts_per_tok"),
        ffn_size=keys.size("moe_intermediate_size"),
        renormalize=keys.flag("norm_topk_prob"),
    )
    sparse = [i not in dense and (i + 1) % step == 0 for i in range(len(spec.layers))]
    return _with_experts(spec, experts, sparse)


def phi3(config: Mapping[str, Any]) -> ModelSpec:
    """Phi-3, Phi-3.5 and Phi-4-mini: packed projections, longrope, partial rotation."""
    keys = ConfigKeys(config)
    return _with_window(keys, _common(keys, "phi3"))


def gemma(config: Mapping[str, Any]) -> ModelSpec:
    """Gemma 1. Its files say gelu in hidden_act where the model was trained with the tanh form."""
    keys = ConfigKeys(config)
    return _gemma(keys, _common(keys, "gemma", tied=True))


def gemma2(config: Mapping[str, Any]) -> ModelSpec:
    """Gemma 2: norms around both halves, soft caps, a window in every other layer."""
    keys = ConfigKeys(config)
    spec = _gemma(keys, _common(keys, "gemma2", tied=True))
    spec = replace(
        spec,
        post_norm=True,
        attention_scale=keys.number("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=_softcap(keys, "attn_logit_softcapping", 50.0),
        logit_softcap=_softcap(keys, "final_logit_softcapping", 30.0),
    )
    sliding = [i % 2 == 0 for i in range(len(spec.layers))]
    return _sliding(keys, spec, keys.size("sliding_window", 4096), sliding)


def gemma3(config: Mapping[str, Any]) -> ModelSpec:
    """Gemma 3, text only: windowed layers have a rotation of their own."""
    keys = ConfigKeys(config)
    keys.expect("use_bidirectional_attention", False)
    spec = _gemma(keys, _common(keys, "gemma3", theta=1e6, tied=True))
    whole, local = spec.ropes[0], replace(spec.ropes[0], scaling="none", theta=1e4, factor=1.0)
    nested = keys.section("rope_parameters").section("sliding_attention")
    if nested.values:
        local = read_rope(ConfigKeys({"rope_parameters": nested.values}), spec.head_dim, 0, 1e4)
    elif keys.has("rope_local_base_freq"):
        local = replace(local, theta=keys.number("rope_local_base_freq"))
    spec = replace(
        spec,
        ropes=(whole, local),
        post_norm=True,
        qk_norm="head",
        attention_scale=keys.number("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=_softcap(keys, "attn_logit_softcapping", 0.0),
        logit_softcap=_softcap(keys, "final_logit_softcapping", 0.0),
    )
    pattern = keys.size("sliding_window_pattern", 6)
    sliding = [(i + 1) % pattern != 0 for i in range(len(spec.layers))]
    spec = _sliding(keys, spec, keys.size("sliding_window", 4096), sliding)
    layers = [replace(layer, rope=1 if layer.window else 0) for layer in spec.layers]
    return replace(spec, layers=tuple(layers))


def gemma3_with_images(config: Mapping[str, Any]) -> ModelSpec:
    """The text part of a Gemma 3 that also takes images, which are not served."""
    text = ConfigKeys(config).section("text_config").values
    return gemma3({"vocab_size": 262208, "num_attention_heads": 8, "head_dim": 256, **text})


def smollm3(config: Mapping[str, Any]) -> ModelSpec:
    """SmolLM3: every fourth layer without rotation."""
    keys = ConfigKeys(config)
    spec = _with_biases(keys, _common(keys, "smollm3", theta=2e6, tied=True))
    count = len(spec.layers)
    interval = keys.size("no_rope_layer_interval", 4)
    rotated = [int((i + 1) % interval != 0) for i in range(count)]
    if keys.has("no_rope_layers"):
        rotated = [int(value) for value in keys.numbers("no_rope_layers", count)]
    if keys.flag("use_sliding_window"):
        sliding = [not value for value in rotated]
        spec = _sliding(keys, spec, keys.size("sliding_window"), sliding)
    layers = zip(spec.layers, rotated, strict=True)
    return replace(spec, layers=tuple(replace(layer, rope=0 if on else -1) for layer, on in layers))


def granite(config: Mapping[str, Any]) -> ModelSpec:
    """Granite 3: llama with four multipliers."""
    keys = ConfigKeys(config)
    return replace(
        _with_biases(keys, _common(keys, "granite")),
        attention_scale=keys.number("attention_multiplier", 1.0),
        embedding_scale=keys.number("embedding_multiplier", 1.0),
        residual_scale=keys.number("residual_multiplier", 1.0),
        logit_scale=1.0 / keys.number("logits_scaling", 1.0),
    )


def olmo2(config: Mapping[str, Any]) -> ModelSpec:
    """OLMo 2: norms behind attention and MLP only, and over whole queries and keys."""
    keys = ConfigKeys(config)
    spec = _with_biases(keys, _common(keys, "olmo2"))
    return replace(spec, pre_norm=False, post_norm=True, qk_norm="all", mlp_bias=False)


def seed_oss(config: Mapping[str, Any]) -> ModelSpec:
    """Seed-OSS: biases of queries, keys, values and of the output are told apart."""
    keys = ConfigKeys(config)
    return replace(
        _common(keys, "seed_oss"),
        qkv_bias=keys.flag("attention_bias", True),
        output_bias=keys.flag("attention_out_bias"),
        mlp_bias=keys.flag("mlp_bias"),
    )


def glm(config: Mapping[str, Any]) -> ModelSpec:
    """GLM-4-9B as converted for transformers (GlmForCausalLM)."""
    keys = ConfigKeys(config)
    spec = _common(keys, "glm", partial=0.5)
    ropes = tuple(replace(rope, interleaved=True) for rope in spec.ropes)
    return replace(spec, ropes=ropes, qkv_bias=keys.flag("attention_bias", True))


def glm4(config: Mapping[str, Any]) -> ModelSpec:
    """GLM-4-0414: norms around both halves."""
    return replace(glm(config), family="glm4", post_norm=True)


def chatglm(config: Mapping[str, Any]) -> ModelSpec:
    """ChatGLM2, ChatGLM3 and GLM-4-9B in their original form (ChatGLMModel).

    rope_ratio multiplies the base (ChatGLM3-6B-32k, GLM-4) or divides the positions
    (ChatGLM2-6B-32k v1.0): the files do not say which. Without our own key rope_ratio_rule it is
    the former, but for the shape of ChatGLM2-6B-32k, whose ratio is 16.
    """
    keys = ConfigKeys(config)
    for key, wanted in (
        ("rmsnorm", True),
        ("post_layer_norm", True),
        ("apply_residual_connection_post_layernorm", False),
    ):
        keys.expect(key, wanted)
    if keys.has("quantization_bit") and config["quantization_bit"] != 0:
        raise ModelError(
            f"config.json: quantization_bit {config['quantization_bit']} (packed weights) is not "
            "supported: take the original checkpoint and pass --quant int8 or nf4"
        )
    heads, head_dim = keys.size("num_attention_heads"), keys.size("kv_channels")
    kv_heads = keys.size("multi_query_group_num") if keys.flag("multi_query_attention") else heads
    _check_heads(heads, kv_heads, "multi_query_group_num")
    rope = read_rope(ConfigKeys({}), head_dim, 0, 10000.0, partial=0.5)
    rope = replace(rope, interleaved=keys.flag("original_rope", True))
    num_layers, vocab = _num_layers(keys, "num_layers"), keys.size("padded_vocab_size")
    ratio = keys.number("rope_ratio", 1.0)
    rule = keys.choice("rope_ratio_rule", _ROPE_RULES, "auto")
    linear = rule == "linear" or (rule == "auto" and (ratio, num_layers, vocab) == (16, 28, 65024))
    if ratio != 1.0 and linear:
        rope = replace(rope, scaling="linear", factor=ratio)
    else:
        rope = replace(rope, theta=rope.theta * ratio)
    linear_bias = keys.flag("add_bias_linear")
    return ModelSpec(
        family="chatglm",
        vocab_size=vocab,
        hidden_size=keys.size("hidden_size"),
        ffn_size=keys.size("ffn_hidden_size"),
        num_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_len=keys.size("seq_length", 2048),
        norm_eps=keys.number("layernorm_epsilon", 1e-5),
        ropes=(rope,),
        layers=(LayerSpec(),) * num_layers,
        attention_scale=head_dim**-0.5,
        qkv_bias=keys.flag("add_qkv_bias") or linear_bias,
        output_bias=linear_bias,
        mlp_bias=linear_bias,
        tied_head=keys.flag("tie_word_embeddings"),
    )


def _common(
    keys: ConfigKeys,
    family: str,
    *,
    theta: float = 10000.0,
    tied: bool = False,
    partial: float = 1.0,
) -> ModelSpec:
    """What all families write the same way; without biases and windows."""
    hidden, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    kv_heads = keys.size("num_key_value_heads", heads)
    head_dim = keys.size("head_dim", hidden // heads)
    _check_heads(heads, kv_heads, "num_key_value_heads")
    max_len = keys.size("max_position_embeddings", 2048)
    return ModelSpec(
        family=family,
        vocab_size=keys.size("vocab_size"),
        hidden_size=hidden,
        ffn_size=keys.size("intermediate_size"),
        num_heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_len=max_len,
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        ropes=(read_rope(keys, head_dim, max_len, theta, partial=partial),),
        layers=(LayerSpec(),) * _num_layers(keys, "num_hidden_layers"),
        attention_scale=head_dim**-0.5,
        norm_offset=keys.number("norm_weight_offset", 0.0),
        activation=keys.choice("hidden_act", _ACTIVATIONS, "silu"),
        tied_head=keys.flag("tie_word_embeddings", tied),
    )


def _gemma(keys: ConfigKeys, spec: ModelSpec) -> ModelSpec:
    bias = keys.flag("attention_bias")
    return replace(
        spec,
        qkv_bias=bias,
        output_bias=bias,
        norm_offset=keys.number("norm_weight_offset", 1.0),
        activation=keys.choice("hidden_activation", _ACTIVATIONS, "gelu_pytorch_tanh"),
        embedding_scale=math.sqrt(spec.hidden_size),
    )


def _with_biases(keys: ConfigKeys, spec: ModelSpec) -> ModelSpec:
    bias = keys.flag("attention_bias")
    return replace(spec, qkv_bias=bias, output_bias=bias, mlp_bias=keys.flag("mlp_bias"))


def _with_window(keys: ConfigKeys, spec: ModelSpec) -> ModelSpec:
    """A window in all layers, unless layer_types says in which."""
    if not keys.has("sliding_window"):
        return spec
    return _sliding(keys, spec, keys.size("sliding_window"), [True] * len(spec.layers))


def _with_upper_window(keys: ConfigKeys, spec: ModelSpec) -> ModelSpec:
    """A window from layer max_window_layers on, if it is used at all."""
    if not keys.flag("use_sliding_window") or not keys.has("sliding_window"):
        return spec
    first = keys.number("max_window_layers", 28)
    sliding = [i >= first for i in range(len(spec.layers))]
    return _sliding(keys, spec, keys.size("sliding_window"), sliding)


def _sliding(keys: ConfigKeys, spec: ModelSpec, window: int, default: Sequence[bool]) -> ModelSpec:
    """Sets the window in the layers of `default`, or as layer_types has it."""
    types = keys.values.get("layer_types")
    sliding = default
    if types is not None:
        known = ("sliding_attention", "full_attention")
        if not isinstance(types, list) or len(types) != len(spec.layers):
            raise keys.wrong("layer_types", f"a list of {len(spec.layers)} names")
        unknown = next((name for name in types if name not in known), None)
        if unknown is not None:
            raise ModelError(
                f"config.json: layer_types names {unknown!r}, which is not supported "
                f"({' and '.join(known)} are)"
            )
        sliding = [name == "sliding_attention" for name in types]
    layers = zip(spec.layers, sliding, strict=True)
    return replace(
        spec, layers=tuple(replace(layer, window=window if on else 0) for layer, on in layers)
    )


def _with_experts(spec: ModelSpec, experts: ExpertsSpec, sparse: Sequence[bool]) -> ModelSpec:
    if experts.top_k > experts.num_experts:
        raise ModelError(
            f"config.json: num_experts_per_tok {experts.top_k} is more than the number of experts, "
            f"{experts.num_experts}"
        )
    layers = zip(spec.layers, sparse, strict=True)
    return replace(
        spec,
        experts=experts,
        layers=tuple(replace(layer, experts=on) for layer, on in layers),
    )


def _check_heads(heads: int, kv_heads: int, key: str) -> None:
    if heads % kv_heads:
        raise ModelError(f"config.json: {key} {kv_heads} does not divide {heads} heads")


def _num_layers(keys: ConfigKeys, key: str) -> int:
    """Bounded, because each layer is an object before any file is looked at."""
    number = keys.size(key)
    if number > _MAX_LAYERS:
        raise keys.wrong(key, f"at most {_MAX_LAYERS}")
    return number


def _softcap(keys: ConfigKeys, key: str, default: float) -> float:
    """null means none; a missing key means the family's own."""
    if key in keys.values and keys.values[key] is None:
        return 0.0
    return keys.number(key, default)
