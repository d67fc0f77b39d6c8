"""A model's shape, context length and size, from config.json or GGUF metadata.

Owns nothing. Must not know devices, memory or text. Reads headers, never weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from engine.gguf import GgufHeader
from router.checkpoint.files import weight_files
from router.checkpoint.gguf import read_gguf
from router.checkpoint.pytorch import read_pytorch
from router.checkpoint.safetensors import read_safetensors
from router.errors import EXIT_CONFIG, StartError

MAX_CONFIG_BYTES = 4 * 1024 * 1024

# What one number is called by different model families, in order of preference.
_KEYS: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads", "multi_query_group_num"),
    "head_dim": ("head_dim", "kv_channels"),
    "ffn_size": ("intermediate_size", "ffn_hidden_size", "n_inner", "hidden_dim"),
    "vocab_size": ("vocab_size", "padded_vocab_size"),
    "context_length": (
        "max_position_embeddings",
        "seq_length",
        "n_positions",
        "max_sequence_length",
        "model_max_length",
    ),
    "num_experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_ffn_size": ("moe_intermediate_size",),
}

# Beginnings of the names of architectures that read a whole text at once: no KV cache.
_ENCODERS = (
    "Bert",
    "Roberta",
    "XLMRoberta",
    "Camembert",
    "DistilBert",
    "MPNet",
    "Electra",
    "Albert",
    "NomicBert",
    "ModernBert",
)
# Model types that count positions from the padding id + 1.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The shape of a model. 0 and "" mean that the files do not say."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    context_length: int
    dtype: str = ""  # of the stored weights: "float16", "bfloat16", "float32"
    tied: bool = False  # the output layer is the embedding
    encoder: bool = False  # no KV cache, no output layer
    num_experts: int = 0
    expert_ffn_size: int = 0  # 0 = that of a dense layer

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one token keeps in the KV cache, over all layers."""
        if self.encoder:
            return 0
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def num_embeddings(self) -> int:
        """Weights of the embedding and, if it has its own, of the output layer."""
        return self.vocab_size * self.hidden_size * (1 if self.tied or self.encoder else 2)

    @property
    def num_parameters(self) -> int:
        """Weights of a gated decoder (or plain encoder) of this shape: an estimate without files.

        A mixture of experts is taken to have them in all layers.
        """
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        mlp = (2 if self.encoder else 3) * self.hidden_size * self.ffn_size
        if self.num_experts:
            expert = 3 * (self.expert_ffn_size or self.ffn_size) + 1  # and its row of the router
            mlp = self.num_experts * expert * self.hidden_size
        layer = attention + mlp + 2 * self.hidden_size
        return self.num_embeddings + self.num_layers * layer + self.hidden_size


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Facts and sizes of one model on disk; sizes are 0 if it has no weight files."""

    path: Path
    facts: ModelFacts
    num_parameters: int
    file_bytes: int


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a folder with config.json (and weight files, if any) or a .gguf file.

    Raises `StartError` naming the file that is missing, truncated or inconsistent.
    """
    if path.is_dir():
        return _read_folder(path)
    header = read_gguf(path, texts=False)
    return Checkpoint(
        path,
        facts_of_gguf(header),
        sum(tensor.num_values for tensor in header.tensors),
        sum(tensor.num_bytes for tensor in header.tensors),
    )


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object from a small file. Raises `StartError` naming it."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise StartError(f"{path} is larger than {MAX_CONFIG_BYTES:,} bytes", EXIT_CONFIG)
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError as error:
        raise StartError(f"{path} is missing", EXIT_CONFIG) from error
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise StartError(f"{path} is not readable as JSON: {error}", EXIT_CONFIG) from error


def facts_of_config(config: Mapping[str, Any]) -> ModelFacts:
    """From the contents of config.json, whatever the family calls things."""
    dtype = _dtype(config)
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        config, dtype = {**config, **inner}, _dtype(inner) or dtype
    found = {name: _number(config, keys) for name, keys in _KEYS.items()}
    heads = found["num_heads"]
    if config.get("multi_query_attention") is False or not found["num_kv_heads"]:
        found["num_kv_heads"] = heads
    if not found["head_dim"] and heads:
        found["head_dim"] = found["hidden_size"] // heads
    if not found["ffn_size"]:
        found["ffn_size"] = 4 * found["hidden_size"]
    model_type = str(config.get("model_type") or "")
    names = config.get("architectures") or [model_type]
    architecture = str(names[0]) if isinstance(names, list) and names else ""
    encoder = architecture.startswith(_ENCODERS) and config.get("is_decoder") is not True
    if encoder and model_type in _OFFSET_POSITIONS and found["context_length"]:
        found["context_length"] -= _number(config, ("pad_token_id",)) + 1
    return ModelFacts(
        architecture=architecture,
        dtype=dtype,
        tied=config.get("tie_word_embeddings", model_type.startswith("gemma")) is True,
        encoder=encoder,
        **found,
    )


def facts_of_gguf(header: GgufHeader) -> ModelFacts:
    """From GGUF metadata and tensor shapes."""
    metadata = header.metadata
    family = str(metadata.get("general.architecture", ""))

    def number(key: str) -> int:
        value = metadata.get(f"{family}.{key}", 0)
        if isinstance(value, list):  # some families give one value per layer
            value = max((item for item in value if isinstance(item, int)), default=0)
        return value if isinstance(value, int) and value > 0 else 0

    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    types = Counter[str]()
    for tensor in header.tensors:
        types[_DTYPES.get(tensor.type_name, "")] += tensor.num_bytes
    hidden, heads = number("embedding_length"), number("attention.head_count")
    embedding = shapes.get("token_embd.weight", (hidden, number("vocab_size")))
    return ModelFacts(
        architecture=family,
        num_layers=number("block_count"),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=number("attention.head_count_kv") or heads,
        head_dim=number("attention.key_length") or (hidden // heads if heads else 0),
        ffn_size=number("feed_forward_length"),
        vocab_size=embedding[1] if len(embedding) == 2 else number("vocab_size"),
        context_length=number("context_length"),
        dtype=_main_dtype(types),
        tied="output.weight" not in shapes,
        num_experts=number("expert_count"),
        expert_ffn_size=number("expert_feed_forward_length"),
    )


def _read_folder(folder: Path) -> Checkpoint:
    facts = facts_of_config(read_config(folder / "config.json"))
    num_values, types = 0, Counter[str]()
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            for tensor in read_safetensors(file):
                num_values += tensor.num_values
                types[_DTYPES.get(tensor.dtype, "")] += tensor.num_bytes
        else:
            found = read_pytorch(file)
            num_values += found.num_values
            types[found.dtype] += found.num_bytes
    facts = facts if facts.dtype else replace(facts, dtype=_main_dtype(types))
    return Checkpoint(folder, facts, num_values, types.total())


def _dtype(config: Mapping[str, Any]) -> str:
    value = config.get("torch_dtype") or config.get("dtype")
    return value.removeprefix("torch.") if isinstance(value, str) else ""


def _main_dtype(bytes_by_type: Counter[str]) -> str:
    """The type of most bytes; "" if it is no plain one."""
    return bytes_by_type.most_common(1)[0][0] if bytes_by_type else ""


def _number(config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    return 0
