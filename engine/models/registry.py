"""Architecture name -> how to read its config and where its weights are called what.

Owns the one table of supported architectures. A weight's canonical name is the one of Hugging
Face's llama layout; other layouts give a map to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from engine.config import ModelError
from engine.models.decoder import Decoder, Layer
from engine.models.parts import GatedMlp, RmsNorm
from engine.models.spec import ModelSpec, llama_spec
from engine.quant.base import Linear, LinearMethod

_SPECS: dict[str, Callable[[Mapping[str, Any]], ModelSpec]] = {"LlamaForCausalLM": llama_spec}


class TensorSource(Protocol):
    """Weights by canonical name, read one at a time so that a load never holds two copies."""

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor in its stored type. Raises `ModelError` if missing or shaped otherwise."""
        ...


class Target(NamedTuple):
    """Where and as what weights are put."""

    device: torch.device
    dtype: torch.dtype
    method: LinearMethod


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """config.json's object -> spec. Raises `ModelError` naming the architecture or key."""
    names = config.get("architectures") or []
    for name in names:
        if name in _SPECS:
            return _SPECS[name](config)
    known = ", ".join(sorted(_SPECS))
    raise ModelError(
        f"architecture {', '.join(map(str, names)) or '(none named)'} is not supported ({known})"
    )


def build_decoder(spec: ModelSpec, source: TensorSource, target: Target) -> Decoder:
    """Reads all weights, layer by layer; peak memory is the final size plus one layer."""
    vocabulary = (spec.vocab_size, spec.hidden_size)
    embedding = source.get("model.embed_tokens.weight", vocabulary).to(target.device, target.dtype)
    layers = [_layer(spec, source, target, index) for index in range(spec.num_layers)]
    norm = _norm(spec, source, target, "model.norm.weight")
    head = embedding
    if not spec.tied_head:
        head = source.get("lm_head.weight", vocabulary).to(target.device, target.dtype)
    return Decoder(spec, embedding, layers, norm, target.method(head, None))


def _norm(spec: ModelSpec, source: TensorSource, target: Target, name: str) -> RmsNorm:
    weight = source.get(name, (spec.hidden_size,)).to(target.device, target.dtype)
    return RmsNorm(weight, spec.norm_eps)


def _layer(spec: ModelSpec, source: TensorSource, target: Target, index: int) -> Layer:
    prefix = f"model.layers.{index}."
    q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.kv_heads * spec.head_dim
    hidden, ffn = spec.hidden_size, spec.ffn_size

    def read(name: str, *shape: int) -> Tensor:
        return source.get(prefix + name, shape).to(target.device, target.dtype)

    def packed(parts: list[tuple[str, int]], with_bias: bool) -> Linear:
        """Several projections of the hidden state as one product, rows in the order given."""
        weight = torch.cat([read(f"{name}.weight", rows, hidden) for name, rows in parts])
        bias = torch.cat([read(f"{n}.bias", r) for n, r in parts]) if with_bias else None
        return target.method(weight, bias)

    def single(name: str, columns: int, with_bias: bool) -> Linear:
        bias = read(f"{name}.bias", hidden) if with_bias else None
        return target.method(read(f"{name}.weight", hidden, columns), bias)

    attention = [
        ("self_attn.q_proj", q_rows),
        ("self_attn.k_proj", kv_rows),
        ("self_attn.v_proj", kv_rows),
    ]
    gate_up = packed([("mlp.gate_proj", ffn), ("mlp.up_proj", ffn)], spec.mlp_bias)
    return Layer(
        input_norm=_norm(spec, source, target, prefix + "input_layernorm.weight"),
        qkv=packed(attention, spec.qkv_bias),
        output=single("self_attn.o_proj", q_rows, spec.output_bias),
        mlp_norm=_norm(spec, source, target, prefix + "post_attention_layernorm.weight"),
        mlp=GatedMlp(gate_up, single("mlp.down_proj", ffn, spec.mlp_bias), ffn),
    )
