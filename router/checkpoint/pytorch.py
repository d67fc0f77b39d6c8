"""Sizes in PyTorch .bin files: from the directory of the zip file, without unpickling.

Owns nothing. Never reads a weight and never runs what a pickle may carry: of the pickled table only
the names of the tensors' types are picked out.
Format: what torch.save has written since 1.6, an uncompressed zip file with NAME/data.pkl (the
table of tensors) and NAME/data/0, NAME/data/1, … (their values).
"""

from __future__ import annotations

import pickletools
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from router.errors import EXIT_CONFIG, StartError

_ZIP_MAGIC = b"PK\x03\x04"
_MAX_TABLE_BYTES = 8 * 1024 * 1024  # 80,000 tensors

_DTYPES = {
    "torch FloatStorage": ("float32", 4),
    "torch HalfStorage": ("float16", 2),
    "torch BFloat16Storage": ("bfloat16", 2),
    "torch DoubleStorage": ("float64", 8),
    "torch CharStorage": ("int8", 1),
    "torch ByteStorage": ("uint8", 1),
    "torch LongStorage": ("int64", 8),
    "torch IntStorage": ("int32", 4),
}


@dataclass(frozen=True, slots=True)
class PytorchFile:
    """Bytes of all values, and the type of most of them."""

    num_bytes: int
    dtype: str
    bytes_per_value: int

    @property
    def num_values(self) -> int:
        """Number of weights, taking all to have that type."""
        return self.num_bytes // self.bytes_per_value


class _Broken(ValueError):
    """What is wrong with the file."""


def read_pytorch(path: Path) -> PytorchFile:
    """Size and type of one file.

    Raises `StartError` naming the file if it is truncated, inconsistent or of torch's older format.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
                raise _Broken(
                    "it is not in the zip format that torch has written since 1.6: save it again "
                    "with a newer torch, or convert it to safetensors"
                )
            with zipfile.ZipFile(file) as archive:
                return _read(archive, path.stat().st_size)
    except zipfile.BadZipFile as error:
        raise StartError(
            f"{path} is no usable PyTorch file: {error}; was the download cut short?", EXIT_CONFIG
        ) from error
    except Exception as error:
        # zipfile and pickletools fail on damaged files in many ways (struct.error, EOFError, …)
        raise StartError(
            f"{path} is no usable PyTorch file: {str(error) or type(error).__name__}", EXIT_CONFIG
        ) from error


def _read(archive: zipfile.ZipFile, size: int) -> PytorchFile:
    entries = archive.infolist()
    packed = next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        raise _Broken(f"its part {packed.filename!r} is compressed")
    num_bytes = sum(entry.file_size for entry in entries if "/data/" in entry.filename)
    if num_bytes > size:
        raise _Broken(f"it promises {num_bytes:,} bytes of weights, it has {size:,}")
    table = next((entry for entry in entries if entry.filename.endswith("/data.pkl")), None)
    if table is None:
        raise _Broken("it has no data.pkl")
    if table.file_size > _MAX_TABLE_BYTES:
        raise _Broken(f"its data.pkl has {table.file_size:,} bytes")
    return PytorchFile(num_bytes, *_main_type(archive.read(table)))


def _main_type(table: bytes) -> tuple[str, int]:
    """The type with most bytes. Each storage is (…, type, key, place, number of values), PERSID."""
    memo: dict[int, str] = {}
    weights: Counter[str] = Counter()
    last, storage, count = "", "", 0
    for code, value, _ in pickletools.genops(table):
        match code.name, value:
            case "GLOBAL", str():
                last = value
            case "BINPUT" | "LONG_BINPUT", int():
                memo[value] = last
            case "BINGET" | "LONG_BINGET", int():
                last = memo.get(value, "")
            case "BINPERSID", _:
                weights[storage] += count * _DTYPES[storage][1] if storage else 0
            case _, int():
                count = value
            case _:
                last = ""
        storage = last if last in _DTYPES else storage
    if not weights or not weights.total():
        raise _Broken("its data.pkl names no weights of a known type")
    return _DTYPES[weights.most_common(1)[0][0]]
