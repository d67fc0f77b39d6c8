"""CPU linear layers with weights in oneDNN's blocked layout, the fast path of the CPU engine.

Measured on 2 cores of an AVX-512 machine, the linears of a 135M float32 model: torch's `linear`
reads weights at 17 GB/s for one token and 10 GB/s for 16, the packed product at 55 and 31 GB/s, and
it is 2.3 times faster at 512 tokens. The operators are the ones that torch's own compiler emits for
frozen CPU graphs; they are probed once, because not every build and dtype has them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.quant.base import DenseLinear, LinearMethod

# oneDNN keeps kernels for each number of rows it has met, about 0.5 MB a shape of weights: a 135M
# model came to 1,501 MB with 300 prompts of 2 to 300 tokens. With rows rounded up like this it is
# 1,126 MB, and no slower. (up to so many rows, rounded up to a multiple of this)
_ROUNDING = ((16, 1), (64, 4), (128, 8), (256, 16))
_COARSEST = 32

# Rows for which the layout is chosen: a layout made for 16 rows is also the fastest for 1 and 512.
_ROWS_HINT = 16


class PackedLinear:
    """Same contract as `engine.quant.base.DenseLinear`; the original weight is not kept."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._nbytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
        self._bias = bias
        self._pointwise = torch.ops.mkldnn._linear_pointwise.default
        self._binary = torch.ops.mkldnn._linear_pointwise.binary

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def __call__(self, x: Tensor) -> Tensor:
        extra = extra_rows(len(x))
        y: Tensor = self._pointwise(_padded(x, extra), self._weight, self._bias, "none", [], "")
        return y[: len(x)] if extra else y

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        extra = extra_rows(len(x))
        inputs = _padded(x, extra), _padded(residual, extra)
        y: Tensor = self._binary(*inputs, self._weight, self._bias, "add")
        return y[: len(x)] if extra else y


def extra_rows(count: int) -> int:
    """Rows of zeros behind `count` rows, so that few different numbers occur."""
    return -count % next((step for most, step in _ROUNDING if count <= most), _COARSEST)


def _padded(x: Tensor, extra: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, extra)) if extra else x


def cpu_method(dtype: torch.dtype) -> LinearMethod:
    """The fastest dense method this torch build has for `dtype` on the CPU."""
    weight = torch.eye(16, 32, dtype=dtype)
    x = torch.arange(32, dtype=dtype).expand(2, 32).contiguous()
    try:
        y = PackedLinear(weight, None).add(x, torch.zeros(2, 16, dtype=dtype))
    except (RuntimeError, AttributeError, NotImplementedError):
        return DenseLinear
    return PackedLinear if torch.equal(y, x[:, :16]) else DenseLinear
