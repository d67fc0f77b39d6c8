"""Up to 64 tokens times a weight matrix, on tensor cores. Owns nothing.

The weights are streamed once; the tokens, padded to 16, 32 or 64, are the narrow side of each
product. Not launched ahead of its predecessor (PDL): programs that wait hold the shared memory that
those before them stream through. Measured on an H100, 8 rows through a 6B model: 5.2 ms with, 4.9
without.
"""

# Triton is untyped, and kernels take what a launch passes: pointers, strides, constants.
# pyright: basic
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: PLR0913

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.base import Activation
from engine.kernels.gated import activate
from engine.kernels.gemv import Epilogue

MAX_ROWS = 64
_LEAST_ROWS = 16  # that a product on tensor cores has


class SkinnyConfig(NamedTuple):
    """Output rows and input columns of a tile of weights, warps, tiles under way.

    `flipped` makes the weights the tall side of the product, as Hopper's instructions like it.
    """

    outputs: int = 32
    inputs: int = 256
    num_warps: int = 4
    num_stages: int = 4
    flipped: bool = True


DEFAULT = SkinnyConfig()
_PLAIN = Epilogue()


def skinny(
    x: Tensor, weight: Tensor, epilogue: Epilogue = _PLAIN, config: SkinnyConfig = DEFAULT
) -> Tensor:
    """x [n, in], at most 64 rows, weight [out, in] -> [n, out]; a residual is changed in place."""
    out = epilogue.residual
    if out is None:
        out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    _launch(x, weight, epilogue, config, out, None)
    return out


def skinny_gated(
    x: Tensor,
    weight: Tensor,
    activation: Activation,
    epilogue: Epilogue = _PLAIN,
    config: SkinnyConfig = DEFAULT,
) -> Tensor:
    """x [n, in], weight [2 * size, in], gates first -> activation(gate) * up, [n, size]."""
    size = weight.shape[0] // 2
    out = torch.empty((x.shape[0], size), dtype=x.dtype, device=x.device)
    _launch(x, weight, epilogue, config, out, activation)
    return out


def _launch(
    x: Tensor,
    weight: Tensor,
    epilogue: Epilogue,
    config: SkinnyConfig,
    out: Tensor,
    activation: Activation | None,
) -> None:
    rows, inner = x.shape
    size = out.shape[1]
    bias, residual = epilogue
    outputs, inputs, num_warps, num_stages, flipped = config
    inputs = min(inputs, max(16, triton.next_power_of_2(inner)))
    tokens = max(_LEAST_ROWS, triton.next_power_of_2(rows))
    _skinny[(triton.cdiv(size, outputs),)](
        x, weight, weight if bias is None else bias, out, rows, size, inner, x.stride(0),
        TOKENS=tokens, OUTPUTS=outputs, INPUTS=inputs,
        EVEN=inner % inputs == 0 and size % outputs == 0,
        BIAS=bias is not None, RESIDUAL=residual is not None,
        GATED=activation is not None, ACTIVATION=activation or "silu",
        FLIPPED=flipped, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


@triton.jit
def _tile(pointers, row, size, column, inner, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers, eviction_policy="evict_first")
    inside = (row < size) & (column < inner)
    return tl.load(pointers, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _product(x, weights, total, FLIPPED: tl.constexpr):
    """total + x W^T of x [tokens, k] and weights [n, k]; flipped: its transpose."""
    # No early return: both branches would be compiled, and only one of them fits.
    if FLIPPED:
        total = tl.dot(weights, tl.trans(x), total, input_precision="ieee")
    else:
        total = tl.dot(x, tl.trans(weights), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["rows"])
def _skinny(
    x, weight, bias, out, rows, size, inner, x_stride,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    FLIPPED: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.arange(0, INPUTS)
    token = tl.arange(0, TOKENS)
    first = weight + output.to(tl.int64)[:, None] * inner
    second = first + size.to(tl.int64) * inner
    total = tl.zeros([OUTPUTS, TOKENS] if FLIPPED else [TOKENS, OUTPUTS], tl.float32)
    other = total
    for at in range(0, inner, INPUTS):
        place = at + column
        values = tl.load(
            x + token[:, None] * x_stride + place[None, :],
            mask=(token[:, None] < rows) & (place[None, :] < inner), other=0.0,
        )  # fmt: skip
        tile = _tile(first + place[None, :], output[:, None], size, place[None, :], inner, EVEN)
        total = _product(values, tile, total, FLIPPED)
        if GATED:
            tile = _tile(
                second + place[None, :], output[:, None], size, place[None, :], inner, EVEN
            )
            other = _product(values, tile, other, FLIPPED)
    if FLIPPED:
        total, other = tl.trans(total), tl.trans(other)
    kind = out.dtype.element_ty
    inside = (token[:, None] < rows) & (output[None, :] < size)
    place = out + token[:, None] * size + output[None, :]
    real = output < size
    if BIAS:
        total += tl.load(bias + output, mask=real, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if BIAS:
            other += tl.load(bias + size + output, mask=real, other=0.0).to(tl.float32)[None, :]
        active = activate(total.to(kind).to(tl.float32), ACTIVATION).to(kind).to(tl.float32)
        total = active * other.to(kind).to(tl.float32)
    if RESIDUAL:
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total.to(kind), mask=inside)
