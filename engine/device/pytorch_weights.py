"""Weights from PyTorch's .bin files, without running what a pickle may carry.

Owns the mapped file. Only `torch.load(weights_only=True, mmap=True)` reads them: it rebuilds
tensors and nothing else, and leaves their values in the file until they are copied.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.config import ModelError
from engine.device.stored_tensors import PLAIN_TYPES, missing, refuse_packed, with_shape

_ZIP_MAGIC = b"PK\x03\x04"


class PytorchSource:
    """See `engine.models.registry.TensorSource`. One file is mapped at a time."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._stored: dict[str, tuple[Path, torch.dtype, tuple[int, ...]]] = {}
        self._file: Path | None = None
        self._tensors: Mapping[str, Tensor] = {}
        for file in files:
            for name, tensor in self._open(file).items():
                self._stored[name] = file, tensor.dtype, tuple(tensor.shape)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Raises `ModelError` if the weight is there, but packed."""
        if name not in self._stored:
            return None
        _, dtype, shape = self._stored[name]
        if dtype not in PLAIN_TYPES:
            raise refuse_packed(name, str(dtype).removeprefix("torch."))
        return shape

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A copy: a mapping must not outlive the load, and values may lie apart in the file."""
        if self.shape(name) is None:
            raise missing(name, "pytorch_model*.bin files")
        tensor = with_shape(name, self._open(self._stored[name][0])[name], shape)
        return tensor.clone(memory_format=torch.contiguous_format)

    def _open(self, file: Path) -> Mapping[str, Tensor]:
        if file != self._file:
            self._tensors, self._file = {}, None  # unmap the other file first
            self._tensors, self._file = _load(file), file
        return self._tensors


def _load(file: Path) -> Mapping[str, Tensor]:
    try:
        with file.open("rb") as opened:
            magic = opened.read(len(_ZIP_MAGIC))
        if magic != _ZIP_MAGIC:
            raise ModelError(
                f"{file} is not in the zip format that torch has written since 1.6: older .bin "
                "files are refused, because reading them may run programs; save it again with a "
                "newer torch, or convert it to safetensors"
            )
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = error.__context__ or error  # torch's own text advises to run it all the same
        raise ModelError(
            f"{file} holds more than tensors or is damaged, nothing of it was run: take the model "
            f"from a source that you trust, as safetensors ({_first_line(reason)})"
        ) from error
    except ModelError:
        raise
    except Exception as error:
        # a damaged file can fail anywhere in torch's reader
        raise ModelError(
            f"{file} cannot be read, is the download complete? ({_first_line(error)})"
        ) from error
    if not isinstance(content, Mapping):
        raise ModelError(f"{file} holds a {type(content).__name__}, not weights by name")
    return {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor) and _is_plain(value)
    }


def _is_plain(tensor: Tensor) -> bool:
    """Values in this file, one after the other: not sparse, not on a device of its own."""
    return tensor.layout == torch.strided and tensor.device.type == "cpu"


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
