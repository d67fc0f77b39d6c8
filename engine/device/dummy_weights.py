"""Random weights of any shape: for measuring speed without files, `--load-format dummy`."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

_STD = 0.02
_BLOCK = 1_048_573  # prime, so that no two rows of a matrix are equal


class DummySource:
    """Normal values, ones for norms; the same for the same name, whatever was asked before.

    All weights are cut from one block of random values, repeated: drawing each of a 7B model's
    values takes a minute on a CPU, copying them seconds.
    """

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        block = torch.empty(_BLOCK).normal_(0.0, _STD, generator=generator)
        self._block = block.to(device)

    def shape(self, name: str) -> None:
        """Unknown: any weight is made as it is asked for."""

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        made = torch.empty(shape, device=self._block.device)
        if "norm" in name and name.endswith(".weight"):
            return made.fill_(1.0)
        values = made.view(-1)
        at = -(zlib.crc32(name.encode()) % _BLOCK)
        while at < values.numel():
            first, last = max(at, 0), min(at + _BLOCK, values.numel())
            values[first:last] = self._block[first - at : last - at]
            at += _BLOCK
        return made
