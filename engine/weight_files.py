"""Which files of a model folder hold its weights, by their index or by their names.

Owns nothing; torch-free, never opens a weight file. It is part of the contract between router and
engine, because both must take the same files: the router for sizes, the engine for tensors.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

WeightFormat = Literal["safetensors", "pytorch"]

_MAX_INDEX_BYTES = 64 * 1024 * 1024
_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})(\.\w+)")


class WeightFilesError(ValueError):
    """The index or the set of files cannot be used; the text names the file and the fault."""


class WeightFiles(NamedTuple):
    """The files, sorted by name; none where the folder has no weights."""

    format: WeightFormat
    files: tuple[Path, ...]


def find_weight_files(folder: Path) -> WeightFiles:
    """safetensors files, or else PyTorch's .bin files.

    Of each kind: what the index names; without one the single file; without that all files named
    like weights, of which no numbered one may be missing. Raises `WeightFilesError` if the index is
    unreadable or points outside the folder, or if a file is missing.
    """
    found = _indexed(folder / "model.safetensors.index.json")
    found = found or _named(folder, "model.safetensors", "*.safetensors")
    if found:
        return WeightFiles("safetensors", found)
    found = _indexed(folder / "pytorch_model.bin.index.json")
    return WeightFiles(
        "pytorch", found or _named(folder, "pytorch_model.bin", "pytorch_model*.bin")
    )


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _indexed(index: Path) -> tuple[Path, ...]:
    if not index.is_file():
        return ()
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError(f"it is larger than {_MAX_INDEX_BYTES:,} bytes")
        names = sorted(
            set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values())
        )
        for name in names:
            if name != Path(name).name or name in ("", ".", "..") or "\0" in name:
                raise ValueError(f"it names {name!r}, which is no file of the folder")
            if not (index.parent / name).is_file():
                raise ValueError(
                    f"it names {name}, which is missing ({len(names)} files are expected): "
                    "download it again"
                )
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise WeightFilesError(f"{index} is not usable: {error}") from error
    return tuple(index.parent / name for name in names)


def _named(folder: Path, single: str, pattern: str) -> tuple[Path, ...]:
    if (folder / single).is_file():
        return (folder / single,)
    files = sorted(file for file in folder.glob(pattern) if not file.name.startswith("adapter_"))
    present = {file.name for file in files}
    for match in filter(None, map(_SHARD.fullmatch, sorted(present))):
        stem, total, suffix = match.groups()
        wanted = (f"{stem}-{i:05}-of-{total}{suffix}" for i in range(1, int(total) + 1))
        missing = next((name for name in wanted if name not in present), None)
        if missing:
            raise WeightFilesError(
                f"{folder / missing} is missing, {match[0]} is there: download it again"
            )
    return tuple(files)
