"""Weights and configs: what is loaded is right, what is wrong is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig, ModelError, NotEnoughMemory
from engine.device.build import build_device
from engine.device.dummy_weights import DummySource
from engine.device.memory import num_blocks
from engine.device.weights import open_model
from tools.tiny_model import write_tiny_model

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


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
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight .* is missing"):
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


def test_missing_shards(tiny: Path) -> None:
    (tiny / "model.safetensors").rename(tiny / "model-00002-of-00003.safetensors")
    with pytest.raises(ModelError, match=r"model-00001-of-00003\.safetensors is missing"):
        open_model(tiny, "auto")
    index = tiny / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(ModelError, match=r"names model-1\.safetensors, which is missing"):
        open_model(tiny, "auto")
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(ModelError, match=r"etc/passwd', which is no file of the folder"):
        open_model(tiny, "auto")


@pytest.mark.parametrize("with_index", [True, False])
def test_sharded_safetensors(tiny: Path, with_index: bool) -> None:
    weights = load_file(tiny / "model.safetensors")
    (tiny / "model.safetensors").unlink()
    places: dict[str, str] = {}
    for number in (1, 2):
        file = f"model-{number:05}-of-00002.safetensors"
        part = {
            name: value for i, (name, value) in enumerate(weights.items()) if i % 2 == number - 1
        }
        save_file(part, tiny / file)
        places.update(dict.fromkeys(part, file))
    save_file({"lora": torch.ones(1)}, tiny / "adapter_model.safetensors")
    if with_index:
        index = tiny / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    _, source = open_model(tiny, "auto")
    for name, value in weights.items():
        assert source.shape(name) == tuple(value.shape)
        assert torch.equal(source.get(name, tuple(value.shape)), value)
    assert source.shape("lora") is None
    assert source.shape("none") is None


def test_no_weights_and_no_config(tiny: Path) -> None:
    (tiny / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no weights \(\*\.safetensors or pytorch"):
        build(tiny)
    build(tiny, load_format="dummy")
    (tiny / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json"):
        build(tiny)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"a":' * 5000])
def test_unreadable_configs(tiny: Path, content: bytes) -> None:
    (tiny / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        open_model(tiny, "auto")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method 'gptq'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq'"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "'bitsandbytes'"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "quant_method 'fp8'"),
        ({"quantization_config": {"load_in_8bit": True}}, "quant_method None"),
        ({"quantization_bit": 4}, "quantization_bit 4"),
    ],
)
def test_quantized_checkpoints_are_refused(tiny: Path, change: dict[str, Any], named: str) -> None:
    file = tiny / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ModelError, match=rf"config\.json: .*{named}.*original checkpoint.*--quant"):
        open_model(tiny, "auto")


def test_quantization_bit_0_is_no_quantization(tiny: Path) -> None:
    file = tiny / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_bit": 0}))
    build(tiny)


def test_packed_weights_are_refused_without_a_key_too(tiny: Path) -> None:
    weights = load_file(tiny / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: weights[name].to(torch.int8)}, tiny / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{name} is stored as I8"):
        build(tiny)


def test_adapters_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    save_file({"lora": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"adapter \(LoRA\).*base model 'org/base'"):
        open_model(tmp_path, "auto")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ModelError, match=r"adapter \(LoRA\).*base model 'org/base'"):
        open_model(tmp_path, "auto")


def test_dummy_weights() -> None:
    one, other = DummySource(torch.device("cpu")), DummySource(torch.device("cpu"))
    wide = other.get("wide", (1200, 1000))  # more than the values that were drawn
    assert torch.equal(one.get("x", (3, 4)), other.get("x", (3, 4)))
    assert torch.equal(one.get("wide", (1200, 1000)), wide)
    assert not torch.equal(one.get("x", (3, 4)), one.get("y", (3, 4)))
    assert float(wide.std()) == pytest.approx(0.02, rel=0.02)
    assert abs(float(wide.mean())) < 1e-4
    assert len(wide.unique(dim=0)) == 1200
    for name in ("model.norm.weight", "a.input_layernorm.weight", "self_attn.q_norm.weight"):
        assert torch.equal(one.get(name, (5,)), torch.ones(5))
    assert not torch.equal(one.get("a.norm.bias", (5,)), torch.ones(5))


def test_what_this_version_cannot_do_is_said(tiny: Path) -> None:
    with pytest.raises(ModelError, match="device 'cuda:0'"):
        build(tiny, device="cuda:0")


def test_kv_memory() -> None:
    def blocks(**options: Any) -> int:
        config = EngineConfig(endpoint="", replica=0, epoch=0, model="", **options)
        return num_blocks(config, 1000, 320)

    assert blocks(num_blocks=7) == 7
    assert blocks(kv_bytes=50_000) == 50
    assert blocks(kv_bytes=10**9, max_batch=2) == 20  # never more than all sequences can use
    with pytest.raises(NotEnoughMemory, match="--max-len 288"):
        blocks(kv_bytes=9_999)
