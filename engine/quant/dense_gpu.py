"""16-bit weights on a card, multiplied by the kernel that reads them fastest for so many tokens.

Owns the weights of one layer. cuBLAS is best from some tokens on; below, its products read the
weights at 85 % of the card's bandwidth where a kernel of our own reaches 95 % (h100: 4.58 against
4.07 ms for one token through a 6B model), and what stands around the product can be fused into it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.base import Activation
from engine.kernels.launch import has_triton
from engine.quant.base import DenseLinear, Linear, LinearMethod

if TYPE_CHECKING:
    from engine.quant.fast_products import FastProducts

_MULTIPLE = 16  # sizes that our kernels read in whole vectors


class DenseGpuLinear:
    """See `engine.quant.base.Linear`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, products: FastProducts) -> None:
        self._weight = weight
        self._bias = bias
        self._products = products

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        found = self._products.plain(x, self._weight, self._bias)
        return F.linear(x, self._weight, self._bias) if found is None else found

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        if self._products.add(x, self._weight, self._bias, residual):
            return residual
        residual.addmm_(x, self._weight.t())
        return residual if self._bias is None else residual.add_(self._bias)

    def gated(self, x: Tensor, activation: Activation) -> Tensor:
        """activation(gate) * up: this layer is two in one, the gate's rows first."""
        return self._products.gated(x, self._weight, self._bias, activation)


def dense_gpu_method(device: torch.device, dtype: torch.dtype) -> LinearMethod:
    """Our kernels where they can run and weights have 16 bits, else torch's product."""
    usable = device.type == "cuda" and torch.cuda.is_available() and has_triton()
    if not usable or dtype == torch.float32:
        return DenseLinear
    from engine.quant.fast_products import FastProducts  # imports Triton

    products = FastProducts(torch.cuda.get_device_capability(device))

    def method(weight: Tensor, bias: Tensor | None) -> Linear:
        if any(size % _MULTIPLE for size in weight.shape):
            return DenseLinear(weight, bias)
        return DenseGpuLinear(weight.contiguous(), bias, products)

    return method
