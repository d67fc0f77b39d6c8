"""Weights from safetensors files. Owns the open files, which are mapped, not read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.config import ModelError
from engine.device.stored_tensors import missing, refuse_packed, with_shape

_PLAIN_TYPES = ("F32", "F16", "BF16", "F64")


class SafetensorsSource:
    """See `engine.models.registry.TensorSource`. Headers are checked against the files' sizes."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._opened: dict[str, Any] = {}  # name -> the file that has it
        for file in files:
            try:
                opened: Any = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file}: not a readable safetensors file ({error})") from error
            self._opened.update(dict.fromkeys(opened.keys(), opened))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Raises `ModelError` if the weight is there, but packed."""
        opened = self._opened.get(name)
        if opened is None:
            return None
        stored = opened.get_slice(name)
        if stored.get_dtype() not in _PLAIN_TYPES:
            raise refuse_packed(name, stored.get_dtype())
        return tuple(stored.get_shape())

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if self.shape(name) is None:
            raise missing(name, "safetensors files")
        return with_shape(name, self._opened[name].get_tensor(name), shape)
