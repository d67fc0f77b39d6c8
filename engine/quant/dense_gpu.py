"""16-bit weights on a card, multiplied by what is fastest for so many tokens.

Owns the weights of one layer. For one token cuBLAS reads them at 85 % of the card's bandwidth and a
kernel of our own at 95 % (h100: 4.58 against 4.07 ms through a 6B model), and what stands around
the product can be fused into it; for more tokens it depends (`product_choice`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
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
        return self._products.plain(x, self._weight, self._bias)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        self._products.add(x, self._weight, self._bias, residual)
        return residual

    def gated(self, x: Tensor, activation: Activation) -> Tensor:
        """activation(gate) * up: this layer is two in one, the gate's rows first."""
        return self._products.gated(x, self._weight, self._bias, activation)


def fast_products(
    device: torch.device, dtype: torch.dtype, known: Mapping[str, str] | None = None
) -> FastProducts | None:
    """Our kernels where they can run and weights have 16 bits; `known` as in `FastProducts`."""
    usable = device.type == "cuda" and torch.cuda.is_available() and has_triton()
    if not usable or dtype == torch.float32:
        return None
    from engine.quant.fast_products import FastProducts  # imports Triton

    return FastProducts(torch.cuda.get_device_capability(device), known)


def dense_gpu_method(products: FastProducts | None) -> LinearMethod:
    """The ways that `products` chooses, else torch's product."""
    if products is None:
        return DenseLinear

    def method(weight: Tensor, bias: Tensor | None) -> Linear:
        if any(size % _MULTIPLE for size in weight.shape):
            return DenseLinear(weight, bias)
        return DenseGpuLinear(weight.contiguous(), bias, products)

    return method
