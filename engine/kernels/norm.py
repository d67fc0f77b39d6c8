"""RMSNorm in one kernel. Owns nothing.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467).
"""

# Triton is untyped, and kernels take what a launch passes: pointers, strides, constants.
# pyright: basic
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: PLR0913

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.launch import index_of, pdl_options

_MAX_WARP_VALUES = 512  # values of a row that one warp handles


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; the result is contiguous.

    x is [n, size] or [n, heads, size], its last dimension contiguous. In float32 until the weight,
    rounded to the weight's type before the product.
    """
    size = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x.numel() // size
    heads, head_stride = (1, 0) if x.dim() == 2 else (x.shape[1], x.stride(1))
    padded = triton.next_power_of_2(size)
    _rms_norm[(rows,)](
        x, weight, out, eps, x.stride(0), head_stride, heads, size,
        PADDED=padded, num_warps=_warps(padded), **pdl_options(index_of(x.device)),
    )  # fmt: skip
    return out


def _warps(padded: int) -> int:
    return max(1, min(8, padded // _MAX_WARP_VALUES))


@triton.jit
def _rms_norm(
    x, weight, out, eps, token_stride, head_stride, heads, size,
    PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PADDED)
    inside = columns < size
    scale = tl.load(weight + columns, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    start = (row // heads) * token_stride + (row % heads) * head_stride
    values = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values * values, 0) / size
    normed = (values * tl.math.rsqrt(mean + eps)).to(scale.dtype)
    result = (normed.to(tl.float32) * scale.to(tl.float32)).to(scale.dtype)
    tl.store(out + row * size + columns, result.to(out.dtype.element_ty), mask=inside)
