"""One token times a weight matrix: reads the weights once, at the pace of memory. Owns nothing.

A program computes one output value (of a gated product: a gate and its up value), so that the card
always has some thousand rows under way; sums are float32, in the same order in every run.
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
from engine.kernels.launch import index_of, pdl_options


class Epilogue(NamedTuple):
    """What is added to a product: the sum with `residual` is written into it.

    A norm of the input is better a kernel of its own: in this one each program would do it again,
    and 74 µs for the largest layer of a 6B model became 95 on an H100.
    """

    bias: Tensor | None = None
    residual: Tensor | None = None


class GemvConfig(NamedTuple):
    """Values of a row that a program reads at once, its warps, output rows a program."""

    width: int = 2048
    num_warps: int = 4
    rows: int = 1


DEFAULT = GemvConfig()
_PLAIN = Epilogue()


def gemv(
    x: Tensor, weight: Tensor, epilogue: Epilogue = _PLAIN, config: GemvConfig = DEFAULT
) -> Tensor:
    """x [1, in], weight [out, in] -> [1, out]; with a residual that one, changed."""
    size, inner = weight.shape
    bias, residual = epilogue
    out = residual
    if out is None:
        out = torch.empty((1, size), dtype=x.dtype, device=x.device)
    width = min(config.width, triton.next_power_of_2(inner))
    _gemv[(triton.cdiv(size, config.rows),)](
        x, weight, weight if bias is None else bias, out, size, inner,
        WIDTH=width, ROWS=config.rows, EVEN=inner % width == 0 and size % config.rows == 0,
        BIAS=bias is not None, RESIDUAL=residual is not None,
        num_warps=config.num_warps, **pdl_options(index_of(x.device)),
    )  # fmt: skip
    return out


def gemv_gated(
    x: Tensor,
    weight: Tensor,
    activation: Activation,
    epilogue: Epilogue = _PLAIN,
    config: GemvConfig = DEFAULT,
) -> Tensor:
    """x [1, in], weight [2 * size, in], gates first -> activation(gate) * up, [1, size]."""
    size, inner = weight.shape[0] // 2, weight.shape[1]
    bias, _ = epilogue
    out = torch.empty((1, size), dtype=x.dtype, device=x.device)
    width = min(config.width, triton.next_power_of_2(inner))
    _gemv_gated[(size,)](
        x, weight, weight if bias is None else bias, out, size, inner,
        WIDTH=width, EVEN=inner % width == 0, BIAS=bias is not None,
        ACTIVATION=activation, num_warps=config.num_warps, **pdl_options(index_of(x.device)),
    )  # fmt: skip
    return out


@triton.jit
def _weights(pointers, columns, inner, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers, eviction_policy="evict_first")
    return tl.load(pointers, mask=columns < inner, other=0.0, eviction_policy="evict_first")


@triton.jit
def _values(x, columns, inner):
    return tl.load(x + columns, mask=columns < inner, other=0.0).to(tl.float32)


@triton.jit
def _gemv(
    x, weight, bias, out, size, inner,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < size
    columns = tl.arange(0, WIDTH)
    # Rows behind the last one read the last one again, so that no load needs a second mask.
    start = weight + tl.minimum(row, size - 1).to(tl.int64)[:, None] * inner
    ahead = _weights(start + columns[None, :], columns[None, :], inner, EVEN)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    values = _values(x, columns, inner)
    products = ahead.to(tl.float32) * values[None, :]
    for at in range(WIDTH, inner, WIDTH):
        place = at + columns
        tile = _weights(start + place[None, :], place[None, :], inner, EVEN)
        values = _values(x, place, inner)
        products += tile.to(tl.float32) * values[None, :]
    result = tl.sum(products, 1)
    if BIAS:
        result += tl.load(bias + row, mask=real, other=0.0).to(tl.float32)
    if RESIDUAL:
        result += tl.load(out + row, mask=real, other=0.0).to(tl.float32)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=real)


@triton.jit
def _gemv_gated(
    x, weight, bias, out, size, inner,
    WIDTH: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    gates = weight + row.to(tl.int64) * inner
    ups = weight + (row + size).to(tl.int64) * inner
    gate_tile = _weights(gates + columns, columns, inner, EVEN)
    up_tile = _weights(ups + columns, columns, inner, EVEN)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    values = _values(x, columns, inner)
    gate_products = gate_tile.to(tl.float32) * values
    up_products = up_tile.to(tl.float32) * values
    for at in range(WIDTH, inner, WIDTH):
        place = at + columns
        gate_tile = _weights(gates + place, place, inner, EVEN)
        up_tile = _weights(ups + place, place, inner, EVEN)
        values = _values(x, place, inner)
        gate_products += gate_tile.to(tl.float32) * values
        up_products += up_tile.to(tl.float32) * values
    gate, up = tl.sum(gate_products, 0), tl.sum(up_products, 0)
    if BIAS:
        gate += tl.load(bias + row).to(tl.float32)
        up += tl.load(bias + size + row).to(tl.float32)
    # Rounded in between, as separate kernels would do.
    kind = out.dtype.element_ty
    active = activate(gate.to(kind).to(tl.float32), ACTIVATION).to(kind).to(tl.float32)
    tl.store(out + row, (active * up.to(kind).to(tl.float32)).to(kind))
