"""Model files -> tensors by canonical name: safetensors folders, GGUF files, random weights.

Owns the open files. Every header is checked against its file before anything is mapped, and every
tensor against the shape that the spec asks for. Nothing here runs code from a model folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.config import ModelError
from engine.gguf import GgufError, read_gguf
from engine.models.registry import TensorSource


def open_model(path: Path, load_format: str) -> tuple[Mapping[str, Any], TensorSource]:
    """A folder or .gguf file -> (config as in config.json, weights). Raises `ModelError`."""
    if path.suffix == ".gguf":
        source = GgufSource(path)
        return source.config, source
    config = _read_json(path / "config.json")
    if load_format == "dummy":
        return config, DummySource()
    return config, SafetensorsSource(path)


class SafetensorsSource:
    """All *.safetensors files of a folder, by their index or by looking."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        for file in _shards(folder):
            try:
                with safe_open(file, framework="pt") as opened:
                    self._files.update(dict.fromkeys(opened.keys(), file))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file}: not a readable safetensors file ({error})") from error

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        file = self._files.get(name)
        if file is None:
            raise ModelError(f"weight {name} is missing from the safetensors files")
        with safe_open(file, framework="pt") as opened:
            return _check(name, opened.get_tensor(name), shape)


class DummySource:
    """Random weights of any asked shape: for measuring speed, `--load-format dummy`."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        return torch.empty(shape).normal_(0.0, 0.02, generator=self._generator)


_GGUF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufSource:
    """One .gguf file of llama architecture, dequantized to float32 tensor by tensor.

    GGUF keeps the query and key rows of llama models in the order for interleaved rotary embedding,
    which the decoder takes as it is.
    """

    def __init__(self, path: Path) -> None:
        try:
            header = read_gguf(path, texts=False)
        except GgufError as error:
            raise ModelError(str(error)) from error
        self._metadata = header.metadata
        self._tensors = {_canonical(tensor.name): tensor for tensor in header.tensors}
        self._data = np.memmap(path, mode="r", dtype=np.uint8)
        self.config = self._as_config()

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ModelError(f"weight {name} is missing from the GGUF file")
        raw = self._data[tensor.offset : tensor.offset + tensor.num_bytes]
        rows = raw.reshape(*reversed(tensor.shape[1:]), -1)
        values = dequantize(rows, GGMLQuantizationType[tensor.type_name])
        return _check(name, torch.from_numpy(np.array(values, dtype=np.float32)), shape)

    def _as_config(self) -> Mapping[str, Any]:
        """The file's metadata under the keys of config.json."""
        meta = self._metadata
        family = meta.get("general.architecture")
        if family != "llama":
            raise ModelError(f"GGUF architecture {family!r} is not supported (llama is)")
        if meta.get("llama.rope.scaling.type", "none") != "none":
            raise ModelError("GGUF key llama.rope.scaling.type is not supported (none is)")

        embedding = self._tensors.get("model.embed_tokens.weight")

        def read(key: str) -> Any:
            return meta.get(f"llama.{key}")

        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": read("embedding_length"),
            "intermediate_size": read("feed_forward_length"),
            "num_hidden_layers": read("block_count"),
            "num_attention_heads": read("attention.head_count"),
            "num_key_value_heads": read("attention.head_count_kv"),
            "head_dim": read("attention.key_length") or read("rope.dimension_count"),
            "max_position_embeddings": read("context_length"),
            "rms_norm_eps": read("attention.layer_norm_rms_epsilon"),
            "rope_theta": read("rope.freq_base"),
            "vocab_size": embedding.shape[-1] if embedding else None,
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "rope_interleaved": True,
            "dtype": "float32",
        }
        return {key: value for key, value in config.items() if value is not None}


def _canonical(name: str) -> str:
    if name in _GGUF_NAMES:
        return _GGUF_NAMES[name]
    parts = name.split(".")  # blk.<layer>.<part>.<weight|bias>
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _GGUF_LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_GGUF_LAYER_NAMES[parts[2]]}.{parts[3]}"
    return name


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise ModelError(
            f"weight {name} has shape {list(tensor.shape)}, the config asks for {list(shape)}"
        )
    return tensor


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise ModelError(f"{folder}: no *.safetensors file")
        return found
    mapping = _read_json(index).get("weight_map")
    if not isinstance(mapping, Mapping) or not all(isinstance(v, str) for v in mapping.values()):
        raise ModelError(f"{index}: weight_map must map weights to file names")
    names = sorted({Path(value).name for value in mapping.values()})
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ModelError(
            f"{folder}: shard {missing[0]} is missing ({len(missing)} of {len(names)})"
        )
    return [folder / name for name in names]


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return value
