"""Activation and product of a gated MLP, and the look-up of embeddings. Owns nothing."""

# Triton is untyped, and kernels take what a launch passes: pointers, strides, constants.
# pyright: basic
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: PLR0913

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.base import Activation
from engine.kernels.launch import index_of, pdl_options

_BLOCK = 1024
_WARPS = 4
_LARGE = tl.constexpr(80.0)  # exp of it is still a float32, and nothing beside it


def gated(gate_up: Tensor, activation: Activation) -> Tensor:
    """[n, 2 * size], gates first -> activation(gate) * up, [n, size]."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    _gated[(rows, triton.cdiv(size, _BLOCK))](
        gate_up, out, size, ACTIVATION=activation, BLOCK=_BLOCK, num_warps=_WARPS,
        **pdl_options(index_of(gate_up.device)),
    )  # fmt: skip
    return out


def embed(ids: Tensor, table: Tensor, scale: float) -> Tensor:
    """Rows `ids` of the table [vocab, size], times scale; int64 [n] -> [n, size]."""
    size = table.shape[1]
    out = torch.empty((len(ids), size), dtype=table.dtype, device=table.device)
    _embed[(len(ids), triton.cdiv(size, _BLOCK))](
        ids, table, out, size, scale, BLOCK=_BLOCK, num_warps=_WARPS,
        **pdl_options(index_of(table.device)),
    )  # fmt: skip
    return out


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of float32 values."""
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(tl.minimum(-x, _LARGE)))
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    # gelu_tanh, with tanh(y) = 1 - 2 / (exp(2y) + 1)
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return 0.5 * x * (2.0 - 2.0 / (tl.exp(tl.minimum(2.0 * inner, _LARGE)) + 1.0))


@triton.jit
def _gated(
    gate_up, out, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    start = gate_up + row * 2 * size
    gate = tl.load(start + columns, mask=inside, other=0.0)
    up = tl.load(start + size + columns, mask=inside, other=0.0)
    # Rounded before the product, as torch does with two operations.
    active = activate(gate.to(tl.float32), ACTIVATION).to(gate.dtype)
    product = active.to(tl.float32) * up.to(tl.float32)
    tl.store(out + row * size + columns, product.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _embed(ids, table, out, size, scale, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    token = tl.load(ids + row).to(tl.int64)
    values = tl.load(table + token * size + columns, mask=inside, other=0.0)
    scaled = (values.to(tl.float32) * scale).to(out.dtype.element_ty)
    tl.store(out + row * size + columns, scaled, mask=inside)
