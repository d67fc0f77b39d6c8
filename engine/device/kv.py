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
    """`layers[i]` is [2 * kv_heads, num_blocks, block_size, head_dim]: key heads, value heads."""

    def __init__(
        self,
        shape: ModelShape,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        sizes = (2 * shape.kv_heads, num_blocks, block_size, shape.head_dim)
        self.layers: list[Tensor] = [_zeros(sizes, dtype, device) for _ in range(shape.num_layers)]

    @property
    def nbytes(self) -> int:
        """Memory held, all layers."""
        return sum(layer.nbytes for layer in self.layers)

    def copy(self, copies: list[Copy]) -> None:
        """Copies the first tokens of blocks into others, as planned."""
        for copy in copies:
            for layer in self.layers:
                layer[:, copy.target, : copy.count] = layer[:, copy.source, : copy.count]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, not garbage: masked positions are multiplied by 0, and 0 * NaN would be NaN.

    On the CPU the kernel's untouched zero pages serve, so that memory is taken as blocks are used
    (torch would write all of it at start).
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(pages).view(dtype).view(shape)
