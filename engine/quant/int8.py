"""Weight-only int8: one symmetric scale per output channel, the same numbers on every device.

Owns the quantized weights of one layer. Must not know models or devices' kernels beyond torch's.

Two ways to multiply, chosen once by a probe. Where torch has an exact int8 product, activations are
split into two int8 digits: x = step * (high + low / 127) with one step per row, an error below
2^-14 of the row's largest value, finer than bfloat16's 2^-9. Both digits meet the same int8
weights, so no wide copy of a weight ever exists, and a row's result does not depend on the other
rows. Elsewhere weights are widened a few rows at a time.

Measured on 2 cores of an AVX-512 machine with VNNI, 13696 x 4096 weights: 1.4 ms for one row
against 2.5 ms for packed float32 weights, 6.4 against 5.8 ms for 16 rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.quant.base import LinearMethod

# Weights are quantized, and widened where they must be, so many values at a time: 4 MB of float32
# in a CPU's cache, on a GPU more because each operation costs microseconds.
_BLOCK_VALUES, _CUDA_BLOCK_VALUES = 1 << 20, 1 << 22
# Rows of activations multiplied at a time: bounds the int32 products of a prompt's chunk.
_MAX_ROWS = 512
# torch's CUDA product takes sizes that are multiples of 8 and more than 16 rows.
_CUDA_MULTIPLE, _CUDA_ROWS = 8, 32
_LEAST_STEP = 1e-30


class Int8Weight:
    """int8 `values` [out, in] and float32 `scales` [out]: weight = values * scales."""

    def __init__(self, weight: Tensor) -> None:
        """Reads the weight a few rows at a time: no second copy of it exists meanwhile."""
        rows, columns = weight.shape
        self.values = torch.empty((rows, columns), dtype=torch.int8, device=weight.device)
        self.scales = torch.empty(rows, dtype=torch.float32, device=weight.device)
        for some in _row_blocks(weight):
            wide = weight[some].float()
            scales = wide.abs().amax(1).div_(127).clamp_(min=_LEAST_STEP)
            self.scales[some] = scales
            self.values[some] = wide.div(scales[:, None]).round_()

    @property
    def nbytes(self) -> int:
        """Memory of values and scales."""
        return self.values.nbytes + self.scales.nbytes


class SplitInt8Linear:
    """See `engine.quant.base.Linear`. Activations as two int8 digits, products in int32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = Int8Weight(weight)
        self._columns = self._weight.values.t()
        self._bias = bias

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) <= _MAX_ROWS:
            return self._product(x)
        starts = range(0, len(x), _MAX_ROWS)
        return torch.cat([self._product(x[at : at + _MAX_ROWS]) for at in starts])

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual.add_(self(x))

    def _product(self, x: Tensor) -> Tensor:
        steps = x.abs().amax(1, keepdim=True).float().div_(127)
        high, low = self._digit_products(self._digits(x / steps), len(x))
        y = (low * (1 / 127)).add_(high).mul_(steps).mul_(self._weight.scales).to(x.dtype)
        return y if self._bias is None else y.add_(self._bias)

    def _digits(self, ratios: Tensor) -> Tensor:
        """[rows, in] in -127…127 -> int8 rows of whole parts, then rows of 127ths, then any rows.

        A row of zeros has no ratios; whatever its digits are, its step makes zeros of them.
        """
        rows, columns = ratios.shape
        needed = max(2 * rows, _CUDA_ROWS) if ratios.is_cuda else 2 * rows
        digits = torch.empty((needed, columns), dtype=torch.int8, device=ratios.device)
        digits[:rows] = ratios
        digits[rows : 2 * rows] = ratios.frac_().mul_(127).round_()
        return digits

    def _digit_products(self, digits: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """int32 [rows, out] of the whole parts and of the 127ths."""
        if len(digits) == 2:
            # The product of one row reads the weights as they lie, that of two packs them first.
            return _int_product(digits[:1], self._columns), _int_product(digits[1:], self._columns)
        products = _int_product(digits, self._columns)
        return products[:rows], products[rows : 2 * rows]


class WidenedInt8Linear:
    """See `engine.quant.base.Linear`. Weights are widened to the activations' type by blocks."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = Int8Weight(weight)
        self._bias = bias

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        values, scales = self._weight.values, self._weight.scales
        y = x.new_empty(len(x), len(values))
        for some in _row_blocks(values):
            wide = values[some] * scales[some, None]
            y[:, some] = F.linear(x, wide.to(x.dtype))
        return y if self._bias is None else y.add_(self._bias)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual.add_(self(x))


def int8_method(device: torch.device) -> LinearMethod:
    """The faster way that this device and torch build have."""
    return _split_where_possible if _has_int8_product(device) else WidenedInt8Linear


def _split_where_possible(
    weight: Tensor, bias: Tensor | None
) -> SplitInt8Linear | WidenedInt8Linear:
    if weight.is_cuda and any(size % _CUDA_MULTIPLE for size in weight.shape):
        return WidenedInt8Linear(weight, bias)
    return SplitInt8Linear(weight, bias)


def _has_int8_product(device: torch.device) -> bool:
    """Exact, and not slow: without VNNI a CPU's product is a loop over single values."""
    if device.type == "cpu" and not _has_vnni():
        return False
    digits = torch.arange(-128, 128, dtype=torch.int8).repeat(_CUDA_ROWS, 1)
    weights = torch.full((16, 256), -127, dtype=torch.int8)
    weights[8:] = torch.arange(-128, 128, dtype=torch.int8)
    exact = digits.long() @ weights.long().t()
    digits, columns = digits.to(device), weights.to(device).t()
    try:
        products = _int_product(digits, columns).cpu()
        single = products[:1] if digits.is_cuda else _int_product(digits[:1], columns)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.equal(products.long(), exact) and torch.equal(single.long(), exact[:1])


def _int_product(digits: Tensor, columns: Tensor) -> Tensor:
    """int8 [rows, in] times int8 [in, out] -> int32 [rows, out]."""
    products: Tensor = torch.ops.aten._int_mm.default(digits, columns)
    return products


def _has_vnni() -> bool:
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return supported is not None and bool(supported())


def _row_blocks(weight: Tensor) -> list[slice]:
    rows, columns = weight.shape
    step = max(1, (_CUDA_BLOCK_VALUES if weight.is_cuda else _BLOCK_VALUES) // columns)
    return [slice(at, min(at + step, rows)) for at in range(0, rows, step)]
