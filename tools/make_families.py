"""What a checkpoint of each family looks like: the keys of its config.json.

Owns the table of families; sizes come as arguments. What the keys mean and how weights are called
is taken from the engine (modules without torch); that checkpoints agree is checked by
tests/unit/test_make_model.py, where transformers loads what is made here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.models import families, names
from engine.models.names import WeightNames
from tools import make_tokenizers


@dataclass(frozen=True)
class Sizes:
    """The numbers that every family has; 0 is the family's own or follows from the others."""

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 0
    intermediate: int = 128
    max_len: int = 2048
    vocab: int = 0


@dataclass(frozen=True)
class Family:
    """`keys` are those of config.json beside sizes and token ids, `tiny` those that go with small
    sizes. An encoder has no `read`; `has_head_dim`: config.json says it in any case."""

    architecture: str
    keys: Mapping[str, Any]
    tiny: Mapping[str, Any] = field(default_factory=dict)
    sizes: Sizes = field(default_factory=Sizes)
    read: families.Reader | None = None
    names: WeightNames = names.LLAMA
    tokenizer: make_tokenizers.Maker = make_tokenizers.byte_level
    has_head_dim: bool = False


_LLAMA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
_GEMMA = {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
}
_GLM = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "tie_word_embeddings": False,
}
_CHATGLM = {
    "model_type": "chatglm",
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "original_rope": True,
    "post_layer_norm": True,
    "rmsnorm": True,
    "use_cache": True,
    "tie_word_embeddings": False,
}
_QWEN = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
}

FAMILIES: dict[str, Family] = {
    "chatglm2": Family(
        "ChatGLMModel",
        {"_name_or_path": "THUDM/chatglm2-6b", **_CHATGLM},
        read=families.chatglm,
        names=names.CHATGLM,
        tokenizer=make_tokenizers.chatglm2,
    ),
    "chatglm3": Family(
        "ChatGLMModel",
        {"_name_or_path": "THUDM/chatglm3-6b", **_CHATGLM},
        read=families.chatglm,
        names=names.CHATGLM,
        tokenizer=make_tokenizers.chatglm3,
    ),
    "glm4-9b": Family(
        "ChatGLMModel",
        {
            "_name_or_path": "THUDM/glm-4-9b-chat",
            **_CHATGLM,
            "layernorm_epsilon": 1.5625e-07,
            "rope_ratio": 500,
        },
        read=families.chatglm,
        names=names.CHATGLM,
        tokenizer=make_tokenizers.glm4,
    ),
    "llama": Family("LlamaForCausalLM", _LLAMA, read=families.llama, has_head_dim=True),
    "llama3": Family(
        "LlamaForCausalLM",
        {**_LLAMA, "rope_theta": 500000.0},
        {"rope_scaling": {**_LLAMA3_ROPE, "original_max_position_embeddings": 64}},
        read=families.llama,
    ),
    "vicuna": Family(
        "LlamaForCausalLM",
        {"_name_or_path": "vicuna-7b-v1.5", **_LLAMA},
        sizes=Sizes(kv_heads=4),
        read=families.llama,
        tokenizer=make_tokenizers.llama2,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {
            "model_type": "mistral",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
        {"sliding_window": 32},
        read=families.mistral,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        {
            "model_type": "mixtral",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "output_router_logits": False,
            "tie_word_embeddings": False,
        },
        {"num_local_experts": 4},
        read=families.mixtral,
        names=names.MIXTRAL,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {
            "model_type": "qwen2",
            **_QWEN,
            "sliding_window": 32768,
            "max_window_layers": 21,
        },
        read=families.qwen2,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {
            "model_type": "qwen3",
            **_QWEN,
            "attention_bias": False,
            "sliding_window": None,
            "max_window_layers": 28,
        },
        read=families.qwen3,
        has_head_dim=True,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {
            "model_type": "qwen3_moe",
            **_QWEN,
            "attention_bias": False,
            "sliding_window": None,
            "max_window_layers": 48,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "output_router_logits": False,
        },
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
        read=families.qwen3_moe,
        has_head_dim=True,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        {
            "model_type": "phi3",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "attention_bias": False,
            "sliding_window": 2047,
            "tie_word_embeddings": False,
        },
        {"sliding_window": 32, "original_max_position_embeddings": 2048},
        read=families.phi3,
        names=names.PHI3,
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        {"model_type": "gemma", **_GEMMA, "hidden_act": "gelu", "hidden_activation": None},
        sizes=Sizes(kv_heads=1),
        read=families.gemma,
        has_head_dim=True,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        {
            "model_type": "gemma2",
            **_GEMMA,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
        },
        {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 24, "sliding_window": 32},
        read=families.gemma2,
        names=names.GEMMA2,
        has_head_dim=True,
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        {
            "model_type": "gemma3_text",
            **_GEMMA,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": None,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "query_pre_attn_scalar": 256,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
        },
        {"query_pre_attn_scalar": 24, "sliding_window": 32, "sliding_window_pattern": 2},
        read=families.gemma3,
        names=names.GEMMA2,
        has_head_dim=True,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {
            "model_type": "smollm3",
            **_QWEN,
            "rope_theta": 5000000.0,
            "rope_scaling": None,
            "attention_bias": False,
            "mlp_bias": False,
            "no_rope_layer_interval": 4,
            "sliding_window": None,
            "tie_word_embeddings": True,
        },
        {"no_rope_layer_interval": 2},
        read=families.smollm3,
    ),
    "granite": Family(
        "GraniteForCausalLM",
        {
            "model_type": "granite",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "attention_bias": False,
            "mlp_bias": False,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.015625,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
        },
        {
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.8,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
        },
        read=families.granite,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        {
            "model_type": "olmo2",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 500000.0,
            "rope_scaling": None,
            "attention_bias": False,
            "tie_word_embeddings": False,
        },
        sizes=Sizes(kv_heads=4),
        read=families.olmo2,
        names=names.OLMO2,
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        {
            "model_type": "seed_oss",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000000.0,
            "rope_scaling": {"rope_type": "default"},
            "attention_bias": True,
            "attention_out_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
        },
        read=families.seed_oss,
        has_head_dim=True,
    ),
    "glm": Family(
        "GlmForCausalLM",
        {"model_type": "glm", **_GLM, "rms_norm_eps": 1.5625e-07},
        read=families.glm,
        names=names.GLM,
        has_head_dim=True,
    ),
    "glm4": Family(
        "Glm4ForCausalLM",
        {"model_type": "glm4", **_GLM},
        read=families.glm4,
        names=names.GLM4,
        has_head_dim=True,
    ),
    "bert": Family(
        "BertModel",
        {
            "model_type": "bert",
            "attention_probs_dropout_prob": 0.1,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1,
            "initializer_range": 0.02,
            "layer_norm_eps": 1e-12,
            "position_embedding_type": "absolute",
            "type_vocab_size": 2,
            "use_cache": True,
        },
        sizes=Sizes(max_len=512),
        tokenizer=make_tokenizers.wordpiece,
    ),
}


def config_json(
    family: Family, sizes: Sizes, changes: Mapping[str, Any], made: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json. `changes` come over the family's keys; `made` are dtype and token ids."""
    config: dict[str, Any] = {"architectures": [family.architecture]}
    config |= {**family.keys, **changes, **made}
    head_dim = sizes.head_dim or sizes.hidden // sizes.heads
    if family.read is families.chatglm:
        return config | {
            "num_layers": sizes.layers,
            "hidden_size": sizes.hidden,
            "ffn_hidden_size": sizes.intermediate,
            "num_attention_heads": sizes.heads,
            "multi_query_group_num": sizes.kv_heads,
            "kv_channels": head_dim,
            "padded_vocab_size": sizes.vocab,
            "seq_length": sizes.max_len,
        }
    config |= {
        "num_hidden_layers": sizes.layers,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_attention_heads": sizes.heads,
        "vocab_size": sizes.vocab,
        "max_position_embeddings": sizes.max_len,
    }
    if family.read:
        config["num_key_value_heads"] = sizes.kv_heads
    if family.has_head_dim or head_dim * sizes.heads != sizes.hidden:
        config["head_dim"] = head_dim
    return config
