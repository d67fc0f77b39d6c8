"""Linear layers behind one protocol, so that the decoder does not know how its weights are stored.

Owns the weights of one layer. Must not know models or attention.

`add` exists because a kernel can add the residual for free while the result is still in registers;
a method that cannot does the same in two steps.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class Linear(Protocol):
    """y = x W^T + b for x `[num_tokens, in_features]`; y is `[num_tokens, out_features]`."""

    @property
    def nbytes(self) -> int:
        """Memory held by the weights."""
        ...

    def __call__(self, x: Tensor) -> Tensor: ...

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """y + residual; `residual` has the shape of y and may be overwritten."""
        ...


class LinearMethod(Protocol):
    """How weights become a `Linear`: chosen once in the loader."""

    def __call__(self, weight: Tensor, bias: Tensor | None) -> Linear: ...


class DenseLinear:
    """The plain product, as torch does it on any device."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual.add_(F.linear(x, self._weight, self._bias))
