"""What each family calls its weights. Tables, nothing else."""

from __future__ import annotations

from typing import NamedTuple


class WeightNames(NamedTuple):
    """Names without `.weight` or `.bias`; those of a layer stand behind `layer` with its number.

    `qkv` and `gate_up` name one packed projection or its parts in order. An empty name is a weight
    that the family does not have.
    """

    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{}."
    attention_norm: str = "input_layernorm"
    attention_post_norm: str = ""
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    mlp_norm: str = "post_attention_layernorm"
    mlp_post_norm: str = ""
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    expert: str = "mlp.experts.{}."
    expert_gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    expert_down: str = "down_proj"


LLAMA = WeightNames()

MIXTRAL = LLAMA._replace(
    router="block_sparse_moe.gate",
    expert="block_sparse_moe.experts.{}.",
    expert_gate_up=("w1", "w3"),
    expert_down="w2",
)

PHI3 = LLAMA._replace(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))

GLM = LLAMA._replace(gate_up=("mlp.gate_up_proj",))

GLM4 = GLM._replace(
    attention_post_norm="post_self_attn_layernorm", mlp_post_norm="post_mlp_layernorm"
)

GEMMA2 = LLAMA._replace(
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)

GEMMA3_WITH_IMAGES = GEMMA2._replace(
    embedding="language_model.model.embed_tokens",
    norm="language_model.model.norm",
    head="language_model.lm_head",
    layer="language_model.model.layers.{}.",
)

OLMO2 = LLAMA._replace(
    attention_norm="",
    attention_post_norm="post_attention_layernorm",
    mlp_norm="",
    mlp_post_norm="post_feedforward_layernorm",
)

CHATGLM = WeightNames(
    embedding="transformer.embedding.word_embeddings",
    norm="transformer.encoder.final_layernorm",
    head="transformer.output_layer",
    layer="transformer.encoder.layers.{}.",
    qkv=("self_attention.query_key_value",),
    output="self_attention.dense",
    gate_up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
)
