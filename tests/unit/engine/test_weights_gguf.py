"""GGUF files of every family against transformers, with the model that they came from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from engine.config import ModelError
from engine.device.weights import open_model
from engine.gguf import TENSOR_TYPES
from engine.models.registry import build_decoder, read_spec, shape_of, weight_names_of
from tests.decoding import float32_target, model_logits
from tests.gguf_models import write_gguf_model

TOLERANCE = 2e-4
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
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
GEMMA = {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16}
# What is set for each: (GGUF architecture, model_type of transformers, keys).
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama", {}),
    "llama tied": ("llama", "llama", {"tie_word_embeddings": True, "head_dim": 16}),
    "llama biases": ("llama", "llama", {"attention_bias": True, "mlp_bias": True}),
    "llama linear": ("llama", "llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "llama3 rope": ("llama", "llama", {"rope_scaling": LLAMA3}),
    "mistral": ("llama", "mistral", {"sliding_window": 7, "head_dim": 8}),
    "mixtral": ("llama", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", "qwen2", {}),
    "qwen2 yarn": ("qwen2", "qwen2", {"rope_theta": 1000.0, "rope_scaling": YARN}),
    "qwen3": ("qwen3", "qwen3", {"head_dim": 16}),
    "qwen3moe": (
        "qwen3moe",
        "qwen3_moe",
        {
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "phi3": ("phi3", "phi3", {"sliding_window": 9}),
    "phi3 partial": ("phi3", "phi3", {"partial_rotary_factor": 0.5}),
    "phi3 longrope": (
        "phi3",
        "phi3",
        {"original_max_position_embeddings": 32, "rope_scaling": LONGROPE},
    ),
    "gemma": ("gemma", "gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", "gemma2", {**GEMMA, **CAPS}),
    "gemma2 27b": (
        "gemma2",
        "gemma2",
        {**GEMMA, "num_hidden_layers": 46, "query_pre_attn_scalar": 8},
    ),
    "gemma3": ("gemma3", "gemma3_text", GEMMA),
    "gemma3 linear": (
        "gemma3",
        "gemma3_text",
        {**GEMMA, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "granite": (
        "granite",
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.2,
        },
    ),
    "olmo2": ("olmo2", "olmo2", {}),
    "smollm3": ("smollm3", "smollm3", {}),
    "glm4": ("glm4", "glm4", {"head_dim": 8}),
    "chatglm": ("chatglm", "glm", {"head_dim": 8}),
}


class Written(NamedTuple):
    """A random model of transformers and the .gguf file made of it."""

    model: Any
    file: Path

    @torch.inference_mode()
    def worst(self, change: dict[str, Any]) -> float:
        """Largest logit difference, with some keys of the config that was read changed."""
        config, source = open_model(self.file, "auto")
        config = {**config, **change}
        spec = read_spec(config)
        decoder = build_decoder(spec, weight_names_of(config), source, float32_target())
        prompt = torch.randint(3, 97, (50,), generator=torch.Generator().manual_seed(5))
        ours = model_logits(decoder, shape_of(spec), [prompt.tolist()])[0]
        return float((ours - self.model(prompt[None]).logits[0]).abs().max())


def write(folder: Path, variant: str) -> Written:
    """With noisy norms and biases."""
    arch, model_type, keys = VARIANTS[variant]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**BASE, **keys}))
    model = model.eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    return Written(model, write_gguf_model(folder / "m.gguf", arch, config, weights))


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_transformers(tmp_path: Path, variant: str) -> None:
    assert write(tmp_path, variant).worst({}) < TOLERANCE


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        ("llama", {"rope_interleaved": False}),
        ("granite", {"rope_interleaved": False}),
        ("smollm3", {"rope_interleaved": False}),
        ("qwen2", {"rope_interleaved": True}),
        ("qwen2 yarn", {"rope_scaling": None}),
        ("llama3 rope", {"rope_freq_factors": None}),
        ("mistral", {"sliding_window": None}),
        ("phi3 longrope", {"rope_scaling": None}),
        ("phi3 partial", {"partial_rotary_factor": 1.0}),
        ("gemma", {"norm_weight_offset": 1.0}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"sliding_window": 50}),
        ("gemma2 27b", {"query_pre_attn_scalar": 16}),
        ("gemma3", {"rope_local_base_freq": 1e6}),
        ("granite", {"attention_multiplier": 0.3}),
        ("glm4", {"partial_rotary_factor": 1.0}),
    ],
)
def test_each_key_is_seen(tmp_path: Path, variant: str, change: dict[str, Any]) -> None:
    assert not write(tmp_path, variant).worst(change) < 20 * TOLERANCE


def write_small(path: Path, arch: str = "llama") -> GGUFWriter:
    """All that a file of one layer needs but most of its tensors; the caller finishes it."""
    writer = GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(256)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((64, 256), np.float32))
    writer.add_tensor("blk.0.attn_output.weight", np.zeros((256, 256), np.float16))
    return writer


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def types_with(method: str) -> list[GGMLQuantizationType]:
    """What the installed package can do this to."""
    able: list[GGMLQuantizationType] = []
    for kind in GGMLQuantizationType:
        values = np.zeros((1, 256), np.float32)
        if method == "dequantize":
            values = np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8)
        try:
            getattr(gguf.quants, method)(values, kind)
        except NotImplementedError:
            continue
        able.append(kind)
    return able


def test_all_types_that_the_package_reads_are_known() -> None:
    unknown = {kind.name for kind in types_with("dequantize") if kind not in TENSOR_TYPES}
    # NVFP4 weights have scales in tensors of their own
    assert unknown <= {"NVFP4"}


@pytest.mark.parametrize("kind", types_with("quantize"), ids=lambda kind: kind.name)
def test_each_type_is_dequantized(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    rows = np.random.default_rng(0).normal(size=(6, 256)).astype(np.float32)
    packed = quantize(rows, kind)
    writer = write_small(tmp_path / "m.gguf")
    writer.add_tensor("blk.0.ffn_up.weight", packed, raw_dtype=kind)
    finish(writer)
    _, source = open_model(tmp_path / "m.gguf", "auto")
    name = "model.layers.0.mlp.up_proj.weight"
    assert source.shape(name) == (6, 256)
    got = source.get(name, (6, 256)).numpy()
    np.testing.assert_array_equal(got, dequantize(packed, kind).astype(np.float32))
    np.testing.assert_allclose(got, rows, atol=2.5)
    with pytest.raises(ModelError, match=r"model\.norm\.weight is missing"):
        source.get("model.norm.weight", (256,))
    with pytest.raises(ModelError, match=r"has shape \[6, 256\], the config asks for \[7, 256\]"):
        source.get(name, (7, 256))


def test_experts_are_cut_from_packed_rows(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(3, 64, 256)).astype(np.float32)
    packed = quantize(rows, GGMLQuantizationType.Q8_0)
    writer = write_small(tmp_path / "m.gguf")
    writer.add_expert_count(3)
    writer.add_expert_used_count(2)
    writer.add_tensor("blk.0.ffn_up_exps.weight", packed, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_gate.2.weight", rows[0])  # as in files of 2023
    finish(writer)
    config, source = open_model(tmp_path / "m.gguf", "auto")
    assert config["architectures"] == ["MixtralForCausalLM"]
    whole = dequantize(packed, GGMLQuantizationType.Q8_0)
    for number in range(3):
        name = f"model.layers.0.block_sparse_moe.experts.{number}.w3.weight"
        np.testing.assert_array_equal(source.get(name, (64, 256)).numpy(), whole[number])
    old = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    np.testing.assert_array_equal(source.get(old, (64, 256)).numpy(), rows[0])


def test_dummy_weights_of_a_gguf_file(tmp_path: Path) -> None:
    finish(write_small(tmp_path / "m.gguf"))
    config, source = open_model(tmp_path / "m.gguf", "dummy")
    assert config["hidden_size"] == 256
    assert source.get("anything", (2, 3)).shape == (2, 3)


REFUSED: dict[str, tuple[str, Callable[[GGUFWriter], Any], str]] = {
    "architecture": ("rwkv6", lambda _: None, "GGUF architecture 'rwkv6' is not supported .*qwen3"),
    "experts with shared ones": ("qwen2moe", lambda _: None, "'qwen2moe' is not supported"),
    "tensor": (
        "llama",
        lambda w: w.add_tensor("blk.0.attn_q_norm.weight", np.ones(64, np.float32)),
        r"tensor blk\.0\.attn_q_norm\.weight has no place in a llama model",
    ),
    "bias of a norm": (
        "qwen3",
        lambda w: w.add_tensor("blk.0.attn_norm.bias", np.ones(64, np.float32)),
        r"tensor blk\.0\.attn_norm\.bias has no place",
    ),
    "type": (
        "llama",
        lambda w: w.add_tensor("blk.0.ffn_up.weight", np.ones((2, 64), np.int32)),
        r"tensor blk\.0\.ffn_up\.weight has the type I32, which cannot be read",
    ),
    "window": ("qwen2", lambda w: w.add_sliding_window(16), "attention.sliding_window 16 is not"),
    "sections": (
        "qwen2",
        lambda w: w.add_rope_dimension_sections([4, 4, 4, 0]),
        r"rope\.dimension_sections \[4, 4, 4, 0\] is not supported",
    ),
    "value length": ("qwen2", lambda w: w.add_value_length(7), "value_length must be 64"),
    "scaling": (
        "llama",
        lambda w: w.add_string("llama.rope.scaling.type", "dynamic"),
        "rope.scaling.type must be none, linear or yarn, it is 'dynamic'",
    ),
    "rotated part": ("llama", lambda w: w.add_rope_dimension_count(66), "must be at most 64"),
    "more layers than there are": (
        "llama",
        lambda w: w.kv_data[0].update(
            {"llama.block_count": w.kv_data[0]["llama.embedding_length"]}
        ),
        "block_count must be at most 1, the layers in the file, it is 256",
    ),
    "kind": ("llama", lambda w: w.add_string("llama.rope.freq_base", "x"), "must be a number"),
    "layers that differ": (
        "llama",
        lambda w: w.add_array("llama.attention.key_length", [64, 32]),
        "key_length must be a number, equal for all layers",
    ),
    "packed rows": (
        "chatglm",
        lambda w: w.add_tensor("blk.0.attn_qkv.weight", np.ones((500, 256), np.float32)),
        r"blk\.0\.attn_qkv\.weight has 500 rows, 4 heads .* ask for 512",
    ),
    "divisors": (
        "llama",
        lambda w: w.add_tensor("rope_freqs.weight", np.ones((2, 3), np.float32)),
        r"tensor rope_freqs\.weight has the shape",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_supported_is_named(tmp_path: Path, what: str) -> None:
    arch, change, named = REFUSED[what]
    writer = write_small(tmp_path / "m.gguf", arch)
    change(writer)
    finish(writer)
    with pytest.raises(ModelError, match=named):
        open_model(tmp_path / "m.gguf", "auto")


@pytest.mark.parametrize("key", ["embedding_length", "attention.layer_norm_rms_epsilon"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    writer = write_small(tmp_path / "m.gguf")
    writer.kv_data[0].pop(f"llama.{key}")
    finish(writer)
    with pytest.raises(ModelError, match=rf"m\.gguf: GGUF key llama\.{key} is missing"):
        open_model(tmp_path / "m.gguf", "auto")


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    writer = write_small(path)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(2.0)
    writer.add_tensor("rope_freqs.weight", np.ones(32, np.float32))
    finish(writer)
    return path.read_bytes()


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, 1400), value=st.binary(min_size=1, max_size=8))
def test_any_damage_is_one_kind_of_error(
    intact: bytes, tmp_path_factory: pytest.TempPathFactory, place: int, value: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged-model.gguf"
    data = bytearray(intact)
    data[place : place + len(value)] = value
    file.write_bytes(data)
    try:
        config, source = open_model(file, "auto")
        read_spec(config)
    except ModelError:
        return
    assert source.shape("model.embed_tokens.weight") is not None
