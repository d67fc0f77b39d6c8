"""Which of our kernels multiplies so many tokens with weights of such a shape; None: cuBLAS does.

Owns the choice.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from engine.kernels.base import Activation
from engine.kernels.gated import gated
from engine.kernels.gemv import Epilogue, GemvConfig, gemv, gemv_gated
from engine.kernels.skinny import MAX_ROWS, SkinnyConfig, skinny, skinny_gated

# Measured on an H100: 14 to 41 us for the four layers of a 6B model, 1 to 5 us less than the worst.
_GEMV, _LONG_GEMV, _GATED_GEMV = GemvConfig(4096, 8), GemvConfig(1024, 4), GemvConfig(4096, 4)
_LONG = 8192
# For older cards Triton 3.6 compiles products of several tokens without tensor cores, and with
# spilled registers (seen in what it makes for a T4).
_TENSOR_CORES = (8, 0)
_PLAIN, _WIDE = SkinnyConfig(32, 256, 4, 4, flipped=True), SkinnyConfig(64, 128, 4, 5, flipped=True)
_GATED = SkinnyConfig(32, 128, 4, 5, flipped=False)


class FastProducts:
    """x [n, in], weight [out, in], bias [out] or None."""

    def __init__(self, capability: tuple[int, int] = _TENSOR_CORES) -> None:
        self._max_rows = MAX_ROWS if capability >= _TENSOR_CORES else 1

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """x W^T + b."""
        if len(x) == 1:
            return gemv(x, weight, Epilogue(bias), _gemv_config(weight))
        config = _WIDE if bias is not None else _PLAIN
        return skinny(x, weight, Epilogue(bias), config) if len(x) <= self._max_rows else None

    def add(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> bool:
        """residual += x W^T + b; False if nothing was done."""
        if len(x) == 1:
            gemv(x, weight, Epilogue(bias, residual), _gemv_config(weight))
        elif len(x) <= self._max_rows:
            skinny(x, weight, Epilogue(bias, residual), _PLAIN)
        else:
            return False
        return True

    def gated(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: Activation,
    ) -> Tensor:
        """activation(gate) * up of x W^T + b, the gate's rows first."""
        if len(x) == 1:
            return gemv_gated(x, weight, activation, Epilogue(bias), _GATED_GEMV)
        if len(x) <= self._max_rows:
            return skinny_gated(x, weight, activation, Epilogue(bias), _GATED)
        return gated(F.linear(x, weight, bias), activation)


def _gemv_config(weight: Tensor) -> GemvConfig:
    return _LONG_GEMV if weight.shape[1] > _LONG else _GEMV
