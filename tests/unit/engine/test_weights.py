"""Weights and configs: what is loaded is right, what is wrong is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig, ModelError, NotEnoughMemory
from engine.device.memory import num_blocks
from engine.device.runner import build_device
from engine.device.weights import DummySource, GgufSource, open_model
from engine.models.registry import read_spec
from engine.models.spec import llama_spec
from tools.tiny_model import write_tiny_model

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_spec_defaults() -> None:
    spec = read_spec(CONFIG)
    assert (spec.kv_heads, spec.head_dim, spec.max_len, spec.tied_head) == (4, 8, 2048, False)
    assert spec.kv_bytes_per_token(4) == 2 * 2 * 4 * 8 * 4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["MysteryForCausalLM"]}, "MysteryForCausalLM"),
        ({"architectures": None}, "none named"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "32"}, "hidden_size must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"rope_scaling\.factor is missing"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
    ],
)
def test_unsupported_configs_name_the_key(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        read_spec({**CONFIG, **change})


def test_both_spellings_of_rope() -> None:
    old = {"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_theta": 5.0, "rope_type": "linear", "factor": 2.0}}
    assert llama_spec({**CONFIG, **old}).rope == llama_spec({**CONFIG, **new}).rope


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path)
    return tmp_path


def build(model: Path, **options: Any) -> None:
    config = EngineConfig(
        endpoint="", replica=0, epoch=0, model=str(model), num_blocks=64, **options
    )
    build_device(config)


def test_tiny_model_loads(tiny: Path) -> None:
    build(tiny)


def test_missing_weight(tiny: Path) -> None:
    weights = load_file(tiny / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tiny / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight is missing"):
        build(tiny)


def test_wrong_shape(tiny: Path) -> None:
    weights = load_file(tiny / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, tiny / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \[3\]"):
        build(tiny)


def test_truncated_file(tiny: Path) -> None:
    file = tiny / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors: not a readable"):
        build(tiny)


def test_missing_shard(tiny: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "../../etc/passwd"}}
    (tiny / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"shard model-1\.safetensors is missing"):
        build(tiny)


def test_no_weights_and_no_config(tiny: Path) -> None:
    (tiny / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        build(tiny)
    build(tiny, load_format="dummy")
    (tiny / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json"):
        build(tiny)


def test_dummy_weights_are_the_same_every_time() -> None:
    assert torch.equal(DummySource().get("x", (3, 4)), DummySource().get("x", (3, 4)))


def test_what_this_version_cannot_do_is_said(tiny: Path) -> None:
    with pytest.raises(ModelError, match="quant 'int8'"):
        build(tiny, quant="int8")
    with pytest.raises(ModelError, match="device 'cuda:0'"):
        build(tiny, device="cuda:0")


def test_gguf_is_dequantized_and_mapped(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(256)
    writer.add_layer_norm_rms_eps(1e-5)
    rows = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    packed = quantize(rows, GGMLQuantizationType.Q4_1)
    writer.add_tensor("token_embd.weight", rows)
    writer.add_tensor("blk.0.ffn_up.weight", packed, raw_dtype=GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config, source = open_model(path, "auto")
    spec = read_spec(config)
    assert (spec.vocab_size, spec.kv_heads, spec.max_len) == (64, 2, 256)
    assert spec.tied_head
    assert spec.rope.interleaved
    got = source.get("model.layers.0.mlp.up_proj.weight", (64, 32))
    want = dequantize(packed, GGMLQuantizationType.Q4_1)
    np.testing.assert_array_equal(got.numpy(), want)
    with pytest.raises(ModelError, match=r"model\.norm\.weight is missing"):
        source.get("model.norm.weight", (32,))


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path, "rwkv6")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="rwkv6"):
        GgufSource(path)


def test_kv_memory() -> None:
    def blocks(**options: Any) -> int:
        config = EngineConfig(endpoint="", replica=0, epoch=0, model="", **options)
        return num_blocks(config, 1000, 320)

    assert blocks(num_blocks=7) == 7
    assert blocks(kv_bytes=50_000) == 50
    assert blocks(kv_bytes=10**9, max_batch=2) == 20  # never more than all sequences can use
    with pytest.raises(NotEnoughMemory, match="--max-len 288"):
        blocks(kv_bytes=9_999)
