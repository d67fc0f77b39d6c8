"""Strict reader of safetensors headers: names, types and sizes, checked against the file's size.

Owns nothing. Must not know what a tensor is for, and never reads tensor data.
Format: https://github.com/huggingface/safetensors (8 bytes of length, JSON, data without holes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import msgspec

from router.errors import EXIT_CONFIG, StartError

_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation

# name -> bits per value
_TYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "F4": 4,
}


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True)
class SafeTensor:
    """One tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def num_values(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


class _Broken(ValueError):
    """What is wrong with the header."""


def read_safetensors(path: Path) -> tuple[SafeTensor, ...]:
    """The tensors of one file.

    Raises `StartError` naming the file if it is truncated or its header is inconsistent.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            prefix = file.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or header_bytes > size - 8:
                raise _Broken(f"it has {size:,} bytes, its header alone needs {header_bytes:,}")
            if header_bytes > _MAX_HEADER_BYTES:
                raise _Broken(f"its header has {header_bytes:,} bytes")
            return _checked(file.read(header_bytes), size - 8 - header_bytes)
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise StartError(f"{path} is no usable safetensors file: {error}", EXIT_CONFIG) from error


def _checked(header: bytes, data_bytes: int) -> tuple[SafeTensor, ...]:
    raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
    raw.pop("__metadata__", None)
    entries = {name: msgspec.json.decode(value, type=_Entry) for name, value in raw.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        first, last = entry.data_offsets
        if first != end or last < first:
            raise _Broken(f"tensor {name!r} lies at {first:,}..{last:,}, expected from {end:,} on")
        if last - first != _num_bytes(name, entry):
            raise _Broken(f"tensor {name!r} has {last - first:,} bytes, its shape says otherwise")
        end = last
    if end > data_bytes:
        missing = end - data_bytes
        raise _Broken(f"{missing:,} bytes are missing at its end, was the download cut short?")
    if end < data_bytes:
        raise _Broken(f"{data_bytes - end:,} bytes at its end belong to no tensor")
    return tuple(
        SafeTensor(name, entry.dtype, tuple(entry.shape), _num_bytes(name, entry))
        for name, entry in entries.items()
    )


def _num_bytes(name: str, entry: _Entry) -> int:
    if entry.dtype not in _TYPE_BITS:
        raise _Broken(f"tensor {name!r} has the unknown type {entry.dtype!r}")
    if any(size < 0 for size in entry.shape):
        raise _Broken(f"tensor {name!r} has a negative size")
    return math.prod(entry.shape) * _TYPE_BITS[entry.dtype] // 8
