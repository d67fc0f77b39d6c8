"""GGUF file header: metadata and tensor table, checked against the file. No tensor is read.

Torch- and numpy-free, because the router reads vocabularies and sizes with it and the engine maps
tensors by it. Layout: the GGUF specification, versions 2 and 3, little-endian. Every count, length
and offset is tested against the bytes that are really there before it is used.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

MAGIC = b"GGUF"
_MAX_DIMENSIONS = 4
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING, _ARRAY = 8, 9
_U32, _U64 = _SCALARS[4], _SCALARS[10]

# ggml type id -> (values per block, bytes per block); the types that weights are found in.
BLOCK_SIZES = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    9: (32, 36),  # Q8_1
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    30: (1, 2),  # BF16
}


class GgufError(ValueError):
    """The file is no GGUF file that can be trusted; the text names the file and the fault."""


class TensorInfo(NamedTuple):
    """One tensor: `shape` in row-major order (rows first), `offset` from the file's start."""

    shape: tuple[int, ...]
    kind: int  # ggml type id, see BLOCK_SIZES
    offset: int
    nbytes: int

    @property
    def size(self) -> int:
        """Number of values."""
        count = 1
        for length in self.shape:
            count *= length
        return count


class GgufHeader(NamedTuple):
    """`metadata` values are int, float, bool, str or lists of them, by their GGUF key."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> GgufHeader:
    """Raises `GgufError`, or OSError if the file cannot be opened."""
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise GgufError(f"{path.name}: too short for a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Cursor(data).header()
            except (struct.error, UnicodeDecodeError, _Bad) as error:
                raise GgufError(f"{path.name}: not a sound GGUF file ({error})") from error


class _Bad(ValueError):
    """A fault inside the file; becomes a `GgufError` with the file's name."""


class _Cursor:
    """Reads forward; every read is bounded by the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0
        self._end = len(data)

    def header(self) -> GgufHeader:
        if self._data[:4] != MAGIC:
            raise _Bad("it does not begin with GGUF")
        self._at = 4
        version = self._scalar(_U32)
        if version not in (2, 3):
            raise _Bad(f"version {version} is not supported (2 and 3 are)")
        num_tensors, num_keys = self._scalar(_U64), self._scalar(_U64)
        self._expect(num_tensors * 24 + num_keys * 13)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            metadata[key] = self._value(self._scalar(_U32))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
            raise _Bad(f"alignment {alignment!r}")
        return GgufHeader(metadata, self._tensors(num_tensors, alignment))

    def _tensors(self, count: int, alignment: int) -> dict[str, TensorInfo]:
        entries: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(count):
            name = self._string()
            dimensions = self._scalar(_U32)
            if not 1 <= dimensions <= _MAX_DIMENSIONS:
                raise _Bad(f"tensor {name!r} has {dimensions} dimensions")
            shape = tuple(reversed([self._scalar(_U64) for _ in range(dimensions)]))
            entries.append((name, shape, self._scalar(_U32), self._scalar(_U64)))
        base = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in entries:
            info = TensorInfo(shape, kind, base + offset, _nbytes(name, shape, kind))
            if offset % alignment or info.offset + info.nbytes > self._end:
                raise _Bad(f"tensor {name!r} lies outside the file or is misaligned")
            if name in tensors:
                raise _Bad(f"tensor {name!r} occurs twice")
            tensors[name] = info
        return tensors

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._scalar(_U32), self._scalar(_U64)
            if inner == _STRING:
                self._expect(count * 8)
                return [self._string() for _ in range(count)]
            if inner not in _SCALARS:
                raise _Bad(f"array of type {inner}")
            unit = _SCALARS[inner]
            self._expect(count * unit.size)
            values = struct.unpack_from(f"<{count}{unit.format[-1]}", self._data, self._at)
            self._at += count * unit.size
            return list(values)
        if kind not in _SCALARS:
            raise _Bad(f"value of type {kind}")
        return self._scalar(_SCALARS[kind])

    def _string(self) -> str:
        length = self._scalar(_U64)
        self._expect(length)
        text = self._data[self._at : self._at + length].decode("utf-8")
        self._at += length
        return text

    def _scalar(self, unit: struct.Struct) -> Any:
        (value,) = unit.unpack_from(self._data, self._at)
        self._at += unit.size
        return value

    def _expect(self, nbytes: int) -> None:
        if nbytes > self._end - self._at:
            raise _Bad(f"{nbytes} bytes are announced, {self._end - self._at} are left")


def _nbytes(name: str, shape: tuple[int, ...], kind: int) -> int:
    if kind not in BLOCK_SIZES:
        raise _Bad(f"tensor {name!r} has the unknown type {kind}")
    values, nbytes = BLOCK_SIZES[kind]
    if shape[-1] % values:
        raise _Bad(f"tensor {name!r}: rows of {shape[-1]} are no whole blocks of {values}")
    total = nbytes
    for length in (*shape[:-1], shape[-1] // values):
        total *= length
    return total
