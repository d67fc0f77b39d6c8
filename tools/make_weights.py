"""Random weights under the names of a family's checkpoints, as one safetensors file.

Must not know torch. The same seed always gives the same bytes.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from engine.models import names
from engine.models.names import WeightNames
from engine.models.spec import LayerSpec, ModelSpec
from tools.make_families import Family

# as safetensors calls them
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Weight(NamedTuple):
    """A tensor to be drawn from a normal distribution."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0


def weights(family: Family, config: Mapping[str, Any]) -> Iterator[Weight]:
    """All tensors of a model.

    Scaled by fan-in, so that activations keep their size through the layers, and logits spread by
    3 to 4: greedy choices have margins far above rounding.
    """
    if family.read is None:
        return _encoder_weights(config)
    return _decoder_weights(family.read(config), family.names)


def _matrix(name: str, rows: int, columns: int, gain: float = 1.0) -> Weight:
    return Weight(f"{name}.weight", (rows, columns), gain * columns**-0.5)


def _linear(name: str, rows: int, columns: int, bias: bool, gain: float = 1.0) -> Iterator[Weight]:
    yield _matrix(name, rows, columns, gain)
    if bias:
        yield Weight(f"{name}.bias", (rows,), 0.1)


def _decoder_weights(spec: ModelSpec, at: WeightNames) -> Iterator[Weight]:
    vocabulary, hidden = (spec.vocab_size, spec.hidden_size), spec.hidden_size
    final_norm = Weight(f"{at.norm}.weight", (hidden,), 0.1, 1.0 - spec.norm_offset)
    if spec.tied_head:  # signs in the norm, or each token would prefer itself as the next one
        spread = hidden**-0.25 / spec.logit_scale
        yield final_norm._replace(std=1.0, mean=-spec.norm_offset)
    else:
        spread = hidden**-0.25 / spec.embedding_scale
        yield final_norm
        yield Weight(f"{at.head}.weight", vocabulary, 4.0 * hidden**-0.5 / spec.logit_scale)
    yield Weight(f"{at.embedding}.weight", vocabulary, spread)
    # Layers must not drown in the residual, or the last token alone would decide.
    gain = max(1.0, 2.0 * spread * spec.embedding_scale / spec.residual_scale)
    for index, layer in enumerate(spec.layers):
        yield from _layer_weights(spec, at, at.layer.format(index), layer, gain)
    if at is names.CHATGLM:  # which must not be used
        yield Weight("transformer.rotary_pos_emb.inv_freq", (spec.ropes[0].dim // 2,), 1.0)


def _layer_weights(
    spec: ModelSpec, at: WeightNames, prefix: str, layer: LayerSpec, gain: float
) -> Iterator[Weight]:
    """`gain` is how large attention and MLP come out."""
    hidden, ffn = spec.hidden_size, spec.ffn_size
    queries, keys = spec.num_heads * spec.head_dim, spec.kv_heads * spec.head_dim
    norms: dict[str, int] = {}
    if spec.pre_norm:
        norms |= dict.fromkeys((at.attention_norm, at.mlp_norm), hidden)
    if spec.post_norm:
        for name in (at.attention_post_norm, at.mlp_post_norm):
            yield Weight(f"{prefix}{name}.weight", (hidden,), 0.1 * gain, gain - spec.norm_offset)
    if spec.qk_norm == "head":
        norms |= dict.fromkeys((at.q_norm, at.k_norm), spec.head_dim)
    elif spec.qk_norm == "all":
        norms |= {at.q_norm: queries, at.k_norm: keys}
    for name, size in norms.items():
        yield Weight(f"{prefix}{name}.weight", (size,), 0.1, 1.0 - spec.norm_offset)

    rows = (queries, keys, keys) if len(at.qkv) == 3 else (queries + 2 * keys,)
    for name, size in zip(at.qkv, rows, strict=True):
        yield from _linear(prefix + name, size, hidden, spec.qkv_bias)
    yield from _linear(prefix + at.output, hidden, queries, spec.output_bias, gain)
    if not layer.experts or spec.experts is None:
        for name in at.gate_up:
            yield from _linear(prefix + name, 2 * ffn // len(at.gate_up), hidden, spec.mlp_bias)
        yield from _linear(prefix + at.down, hidden, ffn, spec.mlp_bias, gain)
        return
    yield _matrix(prefix + at.router, spec.experts.num_experts, hidden)
    for number in range(spec.experts.num_experts):
        inner, ffn = prefix + at.expert.format(number), spec.experts.ffn_size
        for name in at.expert_gate_up:
            yield _matrix(inner + name, ffn, hidden)
        yield _matrix(inner + at.expert_down, hidden, ffn, gain)


def _encoder_weights(config: Mapping[str, Any]) -> Iterator[Weight]:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]

    def norm(name: str) -> Iterator[Weight]:
        yield Weight(f"{name}.weight", (hidden,), 0.1, 1.0)
        yield Weight(f"{name}.bias", (hidden,), 0.1)

    for name, rows in (
        ("word", config["vocab_size"]),
        ("position", config["max_position_embeddings"]),
        ("token_type", config["type_vocab_size"]),
    ):
        yield Weight(f"embeddings.{name}_embeddings.weight", (rows, hidden), 1.0)
    yield from norm("embeddings.LayerNorm")
    for index in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{index}"
        for name in ("query", "key", "value"):
            yield from _linear(f"{at}.attention.self.{name}", hidden, hidden, True)
        yield from _linear(f"{at}.attention.output.dense", hidden, hidden, True)
        yield from norm(f"{at}.attention.output.LayerNorm")
        yield from _linear(f"{at}.intermediate.dense", ffn, hidden, True)
        yield from _linear(f"{at}.output.dense", hidden, ffn, True)
        yield from norm(f"{at}.output.LayerNorm")
    yield from _linear("pooler.dense", hidden, hidden, True)


def save_weights(path: Path, tensors: Iterable[Weight], seed: str, dtype: str) -> None:
    """Draws them, each from a generator of its own, and writes them as one safetensors file."""
    tensors = sorted(tensors)
    item_bytes = 4 if dtype == "float32" else 2
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for weight in tensors:
        begin, end = end, end + math.prod(weight.shape) * item_bytes
        place = {"shape": weight.shape, "data_offsets": (begin, end)}
        header[weight.name] = {"dtype": DTYPES[dtype], **place}
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    with path.open("wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        for weight in tensors:
            file.write(_values(weight, seed, dtype))


def _values(weight: Weight, seed: str, dtype: str) -> bytes:
    import numpy as np

    random = np.random.default_rng(zlib.crc32(f"{seed} {weight.name}".encode()))
    values = random.standard_normal(weight.shape, np.float32)
    values = values * np.float32(weight.std) + np.float32(weight.mean)
    if dtype == "bfloat16":  # which numpy does not have: the upper half, rounded to even
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()
    return values.astype(f"<f{4 if dtype == 'float32' else 2}").tobytes()
