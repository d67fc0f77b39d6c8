"""The generic decoder against transformers on tiny random models of every family.

Prefill, decode and mixed batches; and for every field of the spec a control: a flipped field must
fail the comparison (or be refused, because the weights that it asks for are not there).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from engine.config import ModelError
from engine.models.registry import native_architectures, read_spec
from engine.models.spec import ModelSpec
from engine.quant.base import DenseLinear
from engine.quant.packed import cpu_method
from tests.decoding import HeldTensors, decoder_logits

TOLERANCE = 1e-4
BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What is set for each: (model_type of transformers, keys). Windows are shorter than the prompts.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama head_dim": ("llama", {"head_dim": 16}),
    "llama one kv head": ("llama", {"num_key_value_heads": 1}),
    "llama no groups": ("llama", {"num_key_value_heads": 6}),
    "llama eps": ("llama", {"rms_norm_eps": 0.03}),
    "llama theta": ("llama", {"rope_theta": 333.0}),
    "llama linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "llama3 rope": (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": 7, "head_dim": 8}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", {}),
    "qwen2 window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen2 yarn": (
        "qwen2",
        {
            "rope_theta": 1000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        },
    ),
    "phi3": ("phi3", {"sliding_window": 9}),
    "phi3 partial": ("phi3", {"partial_rotary_factor": 0.5}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 30,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 30},
    ),
    "gemma3 linear": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "smollm3": ("smollm3", {}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.2,
            "attention_bias": True,
        },
    ),
    "olmo2": ("olmo2", {}),
    "seed_oss": ("seed_oss", {"head_dim": 16}),
    "seed_oss output bias": ("seed_oss", {"head_dim": 16, "attention_out_bias": True}),
    "glm": ("glm", {"head_dim": 8}),
    "glm4": ("glm4", {"head_dim": 8}),
}


class Written(NamedTuple):
    """A random model of transformers and what it wrote."""

    model: Any
    config: dict[str, Any]
    source: HeldTensors

    @torch.inference_mode()
    def worst(self, spec: ModelSpec, prompts: list[list[int]]) -> float:
        """Largest logit difference over all prompts."""
        ours = decoder_logits(spec, self.config, self.source, prompts)
        theirs = [self.model(torch.tensor([prompt])).logits[0] for prompt in prompts]
        return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def write(folder: Path, model_type: str, keys: dict[str, Any]) -> Written:
    """A random model with noisy norms and biases, saved as transformers does."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**BASE, **keys}))
    model = model.eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    return Written(model, config, HeldTensors(load_file(folder / "model.safetensors")))


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 97, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize(("model_type", "keys"), VARIANTS.values(), ids=VARIANTS.keys())
def test_equals_transformers(tmp_path: Path, model_type: str, keys: dict[str, Any]) -> None:
    written = write(tmp_path, model_type, keys)
    assert written.worst(read_spec(written.config), prompts(23, 9, 40)) < TOLERANCE


@pytest.mark.parametrize("length", [20, 50])
def test_longrope_follows_the_served_context(tmp_path: Path, length: int) -> None:
    """The short factors up to the original context, the long ones for an engine that serves more.

    transformers changes between them with each call's length, so that cached keys of one kind
    meet queries of the other; here the engine decides once, as the longest context asks for.
    """
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
    keys = {
        "original_max_position_embeddings": 32 if length > 32 else 64,
        "rope_scaling": {"type": "longrope", **factors},
    }
    written = write(tmp_path, "phi3", keys)
    assert written.worst(read_spec(written.config), prompts(length)) < TOLERANCE


def _flips(spec: ModelSpec) -> dict[str, ModelSpec]:
    """The spec with one thing changed, for each thing that this spec has."""
    rope, layer = spec.ropes[0], spec.layers[0]
    ropes, rest = spec.ropes[1:], spec.layers[1:]
    flips: dict[str, dict[str, Any]] = {
        "norm_eps": {"norm_eps": spec.norm_eps + 0.5},
        "attention_scale": {"attention_scale": spec.attention_scale * 1.3},
        "attention_softcap": {"attention_softcap": 0.0 if spec.attention_softcap else 0.5},
        "logit_softcap": {"logit_softcap": 0.0 if spec.logit_softcap else 1.0},
        "embedding_scale": {"embedding_scale": spec.embedding_scale * 2},
        "residual_scale": {"residual_scale": spec.residual_scale * 0.8},
        "logit_scale": {"logit_scale": spec.logit_scale * 1.5},
        "qkv_bias": {"qkv_bias": not spec.qkv_bias},
        "output_bias": {"output_bias": not spec.output_bias},
        "mlp_bias": {"mlp_bias": not spec.mlp_bias},
        "pre_norm": {"pre_norm": not spec.pre_norm},
        "post_norm": {"post_norm": not spec.post_norm},
        "norm_offset": {"norm_offset": 1.0 - spec.norm_offset},
        "qk_norm": {"qk_norm": "head" if spec.qk_norm == "none" else "none"},
        "activation": {"activation": "gelu" if spec.activation == "silu" else "silu"},
        "tied_head": {"tied_head": not spec.tied_head},
        "theta": {"ropes": (replace(rope, theta=rope.theta**0.5), *ropes)},
        "interleaved": {"ropes": (replace(rope, interleaved=not rope.interleaved), *ropes)},
        "dim": {"ropes": (replace(rope, dim=rope.dim // 4 * 2), *ropes)},
        "magnitude": {"ropes": (replace(rope, magnitude=1.4), *ropes)},
        "divisors": {"ropes": (replace(rope, divisors=(2.0,) * (rope.dim // 2)), *ropes)},
        "no rope": {"layers": (replace(layer, rope=-1 if layer.rope == 0 else 0), *rest)},
        "window": {"layers": (replace(layer, window=0 if layer.window else 3), *rest)},
        "experts": {"layers": (replace(layer, experts=not layer.experts), *rest)},
    }
    if rope.scaling != "none":
        flips["scaling"] = {"ropes": (replace(rope, scaling="none", divisors=()), *ropes)}
        flips["factor"] = {"ropes": (replace(rope, factor=rope.factor * 2), *ropes)}
    if len(spec.ropes) > 1:
        flips["ropes"] = {"ropes": (ropes[0], rope)}
    if spec.experts is not None:
        experts = spec.experts
        flips["top_k"] = {"experts": replace(experts, top_k=experts.top_k - 1)}
        flips["renormalize"] = {"experts": replace(experts, renormalize=not experts.renormalize)}
    return {name: replace(spec, **changes) for name, changes in flips.items()}


# Fields that no single flip stands for: sizes (a wrong one is refused) and labels.
_NOT_FLAGS = {
    *("family", "vocab_size", "hidden_size", "ffn_size", "num_heads", "kv_heads", "head_dim"),
    *("max_len", "ropes", "layers", "experts"),
}


def test_every_flag_has_its_flip() -> None:
    spec = read_spec({"architectures": ["LlamaForCausalLM"], **BASE})
    assert set(ModelSpec.__struct_fields__) - _NOT_FLAGS <= set(_flips(spec))


def _is_seen(written: Written, flipped: ModelSpec) -> bool:
    try:
        return not written.worst(flipped, prompts(23)) <= 100 * TOLERANCE  # NaN is seen too
    except (ModelError, AssertionError):
        return True  # refused: it asks for weights that the model does not have


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "keys"), VARIANTS.values(), ids=VARIANTS.keys())
def test_every_flip_is_seen(tmp_path: Path, model_type: str, keys: dict[str, Any]) -> None:
    written = write(tmp_path, model_type, keys)
    flips = _flips(read_spec(written.config))
    assert not [name for name, flipped in flips.items() if not _is_seen(written, flipped)]


def test_every_native_architecture_is_compared() -> None:
    """With transformers here, or with the golden data (ChatGLM)."""
    compared = {
        AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(name, **BASE))].__name__
        for name, _keys in VARIANTS.values()
    }
    elsewhere = {
        "ChatGLMModel",
        "ChatGLMForConditionalGeneration",
        "Gemma3ForConditionalGeneration",  # the text part of Gemma 3 under other names
    }
    assert set(native_architectures()) - elsewhere == compared


@pytest.mark.parametrize("num_tokens", [1, 3, 70])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear_equals_the_plain_one(num_tokens: int, bias: bool) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(37, 29), torch.randn(num_tokens, 29)
    residual = torch.randn(num_tokens, 37)
    offset = torch.randn(37) if bias else None
    packed, plain = cpu_method(torch.float32)(weight, offset), DenseLinear(weight, offset)
    assert packed.nbytes == plain.nbytes
    for got, want in (
        (packed(x), plain(x)),
        (packed.add(x, residual.clone()), plain.add(x, residual.clone())),
    ):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
