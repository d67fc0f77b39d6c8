"""Which of our kernels multiplies so many tokens with weights of such a shape; None: cuBLAS does.

Owns the choice. `tune` measures, everything else asks.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from engine.kernels.base import Activation
from engine.kernels.gated import gated
from engine.kernels.gemv import Epilogue, gemv, gemv_gated
from engine.kernels.skinny import MAX_ROWS, SkinnyConfig, skinny, skinny_gated
from engine.quant.dense_gpu import Norm

_PLAIN = SkinnyConfig(32, 256, 4, 4)
_GATED = SkinnyConfig(16, 256, 4, 4)


class FastProducts:
    """x [n, in], weight [out, in], bias [out] or None."""

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """x W^T + b."""
        if len(x) == 1:
            return gemv(x, weight, Epilogue(bias))
        return skinny(x, weight, bias, None, _PLAIN) if len(x) <= MAX_ROWS else None

    def add(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> bool:
        """residual += x W^T + b; False if nothing was done."""
        if len(x) == 1:
            gemv(x, weight, Epilogue(bias, residual))
        elif len(x) <= MAX_ROWS:
            skinny(x, weight, bias, residual, _PLAIN)
        else:
            return False
        return True

    def normed(self, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm) -> Tensor | None:
        """norm(x) W^T + b."""
        if len(x) == 1:
            return gemv(x, weight, Epilogue(bias, None, norm.weight, norm.eps))
        return None

    def gated(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm: Norm | None,
        activation: Activation,
    ) -> Tensor:
        """activation(gate) * up of norm(x) W^T + b, the gate's rows first."""
        if len(x) == 1:
            epilogue = Epilogue(bias)
            if norm is not None:
                epilogue = Epilogue(bias, None, norm.weight, norm.eps)
            return gemv_gated(x, weight, activation, epilogue)
        x = x if norm is None else norm(x)
        if len(x) <= MAX_ROWS:
            return skinny_gated(x, weight, activation, bias, _GATED)
        return gated(F.linear(x, weight, bias), activation)
