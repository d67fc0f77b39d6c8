"""Rotary embedding of queries and keys, and the write of keys and values to their pages.

Owns nothing. Source: RoFormer (arXiv 2104.09864), section 3.2.2.
"""

# Triton is untyped, and kernels take what a launch passes: pointers, strides, constants.
# pyright: basic, reportCallIssue=false, reportAttributeAccessIssue=false
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: PLR0913

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.launch import index_of, pdl_options

_PROGRAM_VALUES = 2048
_WARPS = 4  # vectors of 16 bytes: a thread has 8 values of each half


def rotate_and_store(
    qkv: Tensor,
    num_heads: int,
    kv_slots: Tensor,
    layer_kv: Tensor,
    turns: Tensor | None,
    interleaved: bool,
) -> None:
    """Rotates queries in place; writes rotated keys, and values, to `kv_slots` of the pages.

    `qkv` [T, num_heads + 2 * kv_heads, head_dim] contiguous, `kv_slots` int64 [T], `layer_kv`
    [2 * kv_heads, num_blocks, block_size, head_dim]; `turns` complex64 [T, dim / 2] rotates the
    first dim values of a head, None none. Keys in `qkv` stay as they were.
    """
    tokens, heads, head_dim = qkv.shape
    half = 0 if turns is None else turns.shape[1]
    rest = head_dim - 2 * half
    table = kv_slots if turns is None else torch.view_as_real(turns)
    at_once = max(1, _PROGRAM_VALUES // triton.next_power_of_2(head_dim))
    first = 0 if half else num_heads  # queries that are not rotated stay where they are
    _rotate_and_store[(tokens, triton.cdiv(heads - first, at_once))](
        qkv, table, kv_slots, layer_kv,
        layer_kv.stride(0), heads, num_heads, layer_kv.shape[0] // 2, first,
        HALF=half, HALF_PADDED=triton.next_power_of_2(max(half, 1)),
        REST=rest, REST_PADDED=triton.next_power_of_2(max(rest, 1)),
        HEADS=at_once, INTERLEAVED=interleaved,
        num_warps=_WARPS, **pdl_options(index_of(qkv.device)),
    )  # fmt: skip


@triton.jit
def _rotate_and_store(
    qkv, table, kv_slots, pages, page_head_stride, heads, num_heads, kv_heads, first,
    HALF: tl.constexpr, HALF_PADDED: tl.constexpr, REST: tl.constexpr, REST_PADDED: tl.constexpr,
    HEADS: tl.constexpr, INTERLEAVED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some heads of one token. Addresses rise by one along a tile, so that it moves in vectors."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    head = first + tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    query, real = head < num_heads, head < heads
    stored = real & (head >= num_heads)
    HEAD_DIM: tl.constexpr = 2 * HALF + REST
    source = qkv + (token * heads + head) * HEAD_DIM
    slot = tl.load(kv_slots + token)
    page = pages + (head - num_heads).to(tl.int64) * page_head_stride + slot * HEAD_DIM
    if HALF > 0:
        pair = tl.arange(0, HALF_PADDED)[None, :]
        both = tl.arange(0, 2 * HALF_PADDED)[None, :]
        one, two = pair < HALF, both < 2 * HALF
        angle = table + (token * HALF + pair) * 2
        cos = tl.load(angle, mask=one, other=1.0)
        sin = tl.load(angle + 1, mask=one, other=0.0)
        if INTERLEAVED:
            x = tl.load(source + both, mask=real & two, other=0.0)
            a, b = tl.split(tl.reshape(x, (HEADS, HALF_PADDED, 2)))
        else:
            a = tl.load(source + pair, mask=real & one, other=0.0)
            b = tl.load(source + HALF + pair, mask=real & one, other=0.0)
        turned = head < num_heads + kv_heads  # values are not
        wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
        a = tl.where(turned, (wide_a * cos - wide_b * sin).to(a.dtype), a)
        b = tl.where(turned, (wide_a * sin + wide_b * cos).to(b.dtype), b)
        if INTERLEAVED:
            x = tl.reshape(tl.join(a, b), (HEADS, 2 * HALF_PADDED))
            tl.store(source + both, x, mask=query & two)
            tl.store(page + both, x, mask=stored & two)
        else:
            tl.store(source + pair, a, mask=query & one)
            tl.store(source + HALF + pair, b, mask=query & one)
            tl.store(page + pair, a, mask=stored & one)
            tl.store(page + HALF + pair, b, mask=stored & one)
    if REST > 0:
        column = 2 * HALF + tl.arange(0, REST_PADDED)[None, :]
        inside = stored & (column < HEAD_DIM)
        tl.store(page + column, tl.load(source + column, mask=inside), mask=inside)
