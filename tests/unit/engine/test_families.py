"""config.json -> spec: defaults, both spellings, and refusals that name the key."""

from __future__ import annotations

from typing import Any

import pytest

from engine.config import ModelError, RopeRule
from engine.models.registry import read_spec, shape_of

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CHATGLM: dict[str, Any] = {
    "architectures": ["ChatGLMModel"],
    "add_qkv_bias": True,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_layers": 28,
    "padded_vocab_size": 65024,
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "kv_channels": 128,
    "num_attention_heads": 32,
    "seq_length": 32768,
    "post_layer_norm": True,
    "rmsnorm": True,
}


def test_spec_defaults() -> None:
    spec = read_spec(CONFIG)
    assert (spec.kv_heads, spec.head_dim, spec.max_len, spec.tied_head) == (4, 8, 2048, False)
    assert shape_of(spec).kv_bytes_per_token(4) == 2 * 2 * 4 * 8 * 4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["MysteryForCausalLM"]}, "MysteryForCausalLM"),
        ({"architectures": None}, "none named"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "32"}, "hidden_size must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers must be at most 1000"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"rope_scaling\.factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, r"rope_scaling\.factor must be"),
        ({"rope_scaling": {"rope_type": "longrope"}}, r"short_factor must be a list of 4"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
        ({"partial_rotary_factor": 0.1}, "partial_rotary_factor 0.1"),
        (
            {"architectures": ["Gemma2ForCausalLM"], "layer_types": ["full_attention", "mamba"]},
            "mamba",
        ),
        (
            {"architectures": ["Gemma2ForCausalLM"], "layer_types": ["full_attention"]},
            "layer_types must be a list of 2 names",
        ),
        (
            {"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True},
            "use_bidirectional_attention True",
        ),
        (
            {
                "architectures": ["MixtralForCausalLM"],
                "num_local_experts": 2,
                "num_experts_per_tok": 3,
            },
            "num_experts_per_tok 3",
        ),
    ],
)
def test_unsupported_configs_name_the_key(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        read_spec({**CONFIG, **change})


def test_both_spellings_of_rope() -> None:
    old = {"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_theta": 5.0, "rope_type": "linear", "factor": 2.0}}
    assert read_spec({**CONFIG, **old}).ropes == read_spec({**CONFIG, **new}).ropes


def test_both_spellings_of_two_ropes() -> None:
    gemma = {**CONFIG, "architectures": ["Gemma3ForCausalLM"], "head_dim": 8}
    old = {
        "rope_theta": 7e5,
        "rope_local_base_freq": 500.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    new = {
        "rope_parameters": {
            "full_attention": {"rope_theta": 7e5, "rope_type": "linear", "factor": 8.0},
            "sliding_attention": {"rope_theta": 500.0, "rope_type": "default"},
        }
    }
    whole, local = read_spec({**gemma, **old}).ropes
    assert (whole.theta, whole.factor, local.theta, local.scaling) == (7e5, 8.0, 500.0, "none")
    again = read_spec({**gemma, **new}).ropes
    assert [(rope.theta, rope.scaling) for rope in again] == [(7e5, "linear"), (500.0, "none")]


def test_null_softcap_is_none_and_a_missing_one_is_gemmas() -> None:
    gemma = {**CONFIG, "architectures": ["Gemma2ForCausalLM"]}
    assert read_spec(gemma).attention_softcap == 50.0
    assert read_spec({**gemma, "attn_logit_softcapping": None}).attention_softcap == 0.0


def test_gemma3_with_images_is_read_by_its_text_part() -> None:
    text = {key: value for key, value in CONFIG.items() if key != "architectures"}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    spec = read_spec(config)
    assert (spec.family, spec.vocab_size, len(spec.layers)) == ("gemma3", 100, 2)


@pytest.mark.parametrize(
    ("change", "rule", "theta", "factor"),
    [
        ({}, "auto", 1e4, 1.0),
        ({"rope_ratio": 50}, "auto", 5e5, 1.0),
        ({"rope_ratio": 16}, "auto", 1e4, 16.0),  # the shape of ChatGLM2-6B-32k
        ({"rope_ratio": 16}, "base", 16e4, 1.0),
        ({"rope_ratio": 16, "num_layers": 40}, "auto", 16e4, 1.0),
        ({"rope_ratio": 500, "num_layers": 40}, "linear", 1e4, 500.0),
    ],
)
def test_the_two_meanings_of_rope_ratio(
    change: dict[str, Any], rule: RopeRule, theta: float, factor: float
) -> None:
    [rope] = read_spec({**CHATGLM, **change}, rule).ropes
    assert (rope.theta, rope.factor, rope.dim, rope.interleaved) == (theta, factor, 64, True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rmsnorm": False}, "rmsnorm False"),
        ({"post_layer_norm": False}, "post_layer_norm"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection"),
        ({"quantization_bit": 4}, "quantization_bit 4.*--quant"),
        ({"kv_channels": None}, "kv_channels is missing"),
        ({"multi_query_group_num": 5}, "multi_query_group_num 5"),
    ],
)
def test_unsupported_chatglm_configs_name_the_key(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        read_spec({**CHATGLM, **change})
