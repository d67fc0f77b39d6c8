"""Weights from one .gguf file, dequantized to float32 one at a time.

Owns the mapped file. What the file calls things is in `engine.device.gguf_families`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from engine.config import ModelError
from engine.device.gguf_families import (
    GLOBAL_NAMES,
    LAYER_PREFIX,
    ROPE_TENSORS,
    Config,
    Fields,
    Names,
    config_of,
    family_of,
)
from engine.device.stored_tensors import missing, with_shape
from engine.gguf import TENSOR_TYPES, GgufError, GgufTensor, read_gguf

_LAYER = re.compile(r"blk\.(\d+)\.(\w+)(?:\.(\d+))?\.(weight|bias)")
_GLOBAL = re.compile(r"(\w+)\.(weight|bias)")
_MAX_DIVISORS = 4096
_TYPE_SIZES = {name: (values, size) for name, values, size in TENSOR_TYPES.values()}


class _Piece(NamedTuple):
    """Whole rows of a stored tensor that make one weight of this shape."""

    tensor: GgufTensor
    first_row: int
    shape: tuple[int, ...]


class GgufSource:
    """See `engine.models.registry.TensorSource`; names are those of the family's own checkpoints.

    Raises `ModelError` for an architecture, a tensor or a type of quantization that is not
    supported: a tensor without a place would be a part of the model that is left out.
    """

    def __init__(self, path: Path) -> None:
        try:
            header = read_gguf(path, texts=False)
        except GgufError as error:
            raise ModelError(str(error)) from error
        fields = Fields(path, header)
        family = family_of(fields)
        self._data: Any = np.memmap(path, mode="r", dtype=np.uint8)
        self.config: Config = config_of(fields, family)
        self._pieces: dict[str, _Piece] = {}
        divisors: dict[str, list[float]] = {}
        for tensor in header.tensors:
            if not _is_readable(tensor.type_name):
                raise ModelError(
                    f"{path}: tensor {tensor.name} has the type {tensor.type_name}, which cannot "
                    "be read: take a file of another quantization"
                )
            if tensor.name in ROPE_TENSORS:
                divisors[tensor.name] = self._divisors(path, tensor)
                continue
            pieces = dict(_pieces(tensor, family.names, self.config))
            if not pieces:
                raise ModelError(
                    f"{path}: tensor {tensor.name} has no place in a {fields.family} model"
                )
            self._pieces.update(pieces)
        self._add_divisors(divisors)

    def shape(self, name: str) -> tuple[int, ...] | None:
        piece = self._pieces.get(name)
        return piece.shape if piece else None

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        piece = self._pieces.get(name)
        if piece is None:
            raise missing(name, "GGUF file")
        return with_shape(name, torch.from_numpy(self._read(piece)), shape)

    def _read(self, piece: _Piece) -> Any:
        """float32 values in memory of their own."""
        tensor = piece.tensor
        per_block, block_bytes = _TYPE_SIZES[tensor.type_name]
        row_bytes = tensor.shape[0] // per_block * block_bytes
        start, rows = tensor.offset, 1
        if len(piece.shape) > 1:
            start, rows = start + piece.first_row * row_bytes, math.prod(piece.shape[:-1])
        packed = self._data[start : start + rows * row_bytes].reshape(rows, row_bytes)
        values = dequantize(packed, GGMLQuantizationType[tensor.type_name])
        if len(piece.shape) == 1:
            values = values[0, piece.first_row : piece.first_row + piece.shape[0]]
        return np.array(values, np.float32, copy=tensor.type_name == "F32").reshape(piece.shape)

    def _divisors(self, path: Path, tensor: GgufTensor) -> list[float]:
        if len(tensor.shape) != 1 or tensor.num_values > _MAX_DIVISORS:
            raise ModelError(f"{path}: tensor {tensor.name} has the shape {list(tensor.shape)}")
        values: list[float] = self._read(_Piece(tensor, 0, tensor.shape)).tolist()
        return values

    def _add_divisors(self, divisors: dict[str, list[float]]) -> None:
        if "rope_freqs.weight" in divisors:
            self.config["rope_freq_factors"] = divisors["rope_freqs.weight"]
        for name, key in (("short", "short_factor"), ("long", "long_factor")):
            found = divisors.get(f"rope_factors_{name}.weight")
            if found and "rope_scaling" in self.config:
                self.config["rope_scaling"][key] = found


def _pieces(tensor: GgufTensor, names: Names, config: Config) -> Iterator[tuple[str, _Piece]]:
    """The weights that one stored tensor holds; none if the family has no such tensor."""
    shape = tensor.shape[::-1]
    match = _GLOBAL.fullmatch(tensor.name)
    if match and match[1] in GLOBAL_NAMES:
        yield f"{GLOBAL_NAMES[match[1]]}.{match[2]}", _Piece(tensor, 0, shape)
    match = _LAYER.fullmatch(tensor.name)
    if not match:
        return
    layer, part, expert, kind = match.groups()
    prefix = LAYER_PREFIX.format(layer)
    if expert:  # files of 2023 have a tensor for each expert
        part += "_exps"
    module = names.get(part)
    if module is None or (kind == "bias" and part.endswith("norm")):
        return
    if isinstance(module, tuple):
        first = 0
        for name, rows in zip(module, _qkv_rows(tensor, config), strict=True):
            yield f"{prefix}{name}.{kind}", _Piece(tensor, first, (rows, *shape[1:]))
            first += rows
    elif "{}" not in module:
        yield f"{prefix}{module}.{kind}", _Piece(tensor, 0, shape)
    elif expert:
        yield f"{prefix}{module.format(expert)}.{kind}", _Piece(tensor, 0, shape)
    elif len(shape) == 3:
        for number in range(shape[0]):
            name = f"{prefix}{module.format(number)}.{kind}"
            yield name, _Piece(tensor, number * shape[1], shape[1:])


def _qkv_rows(tensor: GgufTensor, config: Config) -> tuple[int, int, int]:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    kv_rows = kv_heads * config["head_dim"]
    rows = (heads * config["head_dim"], kv_rows, kv_rows)
    if sum(rows) != tensor.shape[-1]:
        raise ModelError(
            f"weight {tensor.name} has {tensor.shape[-1]} rows, {heads} heads and twice {kv_heads} "
            f"key-value heads of {config['head_dim']} ask for {sum(rows)}"
        )
    return rows


@functools.cache
def _is_readable(type_name: str) -> bool:
    """The installed gguf package turns this type into floats."""
    try:
        block = np.zeros((1, _TYPE_SIZES[type_name][1]), np.uint8)
        dequantize(block, GGMLQuantizationType[type_name])
    except (KeyError, NotImplementedError):
        return False
    return True
