"""The KV cache's memory: one tensor a layer, laid out in blocks. Who may use which block is not
decided here (engine.blocks does)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from engine.models.base import ModelShape
from engine.plan import Copy


class KvCache:
    """`layers[i]` is [2 * kv_heads, num_blocks, block_size, head_dim]: key heads, value heads.

    All layers are one allocation, so that a block is copied in all of them at once.
    """

    def __init__(
        self,
        shape: ModelShape,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        sizes = (shape.num_layers, 2 * shape.kv_heads, num_blocks, block_size, shape.head_dim)
        self._memory = _zeros(sizes, dtype, device)
        self.layers: list[Tensor] = list(self._memory.unbind())

    @property
    def nbytes(self) -> int:
        """Memory held, all layers."""
        return self._memory.nbytes

    def copy(self, copies: list[Copy]) -> None:
        """Copies the first tokens of blocks into others, as planned."""
        for copy in copies:
            source = self._memory[:, :, copy.source, : copy.count]
            self._memory[:, :, copy.target, : copy.count] = source


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, not garbage: masked positions are multiplied by 0, and 0 * NaN would be NaN.

    On the CPU the kernel's untouched zero pages serve, so that memory is taken as blocks are used
    (torch would write all of it at start).
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(pages).view(dtype).view(shape)
