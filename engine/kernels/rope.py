"""Rotary embedding of queries and keys, and the write of keys and values to their pages.

Owns nothing. Source: RoFormer (arXiv 2104.09864), section 3.2.2.
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

_PROGRAM_VALUES = 1024


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
    table = kv_slots if turns is None else torch.view_as_real(turns)
    pairs = triton.next_power_of_2(max(head_dim // 2 + head_dim % 2, half, 1))
    at_once = max(1, _PROGRAM_VALUES // (2 * pairs))
    first = 0 if half else num_heads  # queries that are not rotated stay where they are
    _rotate_and_store[(tokens, triton.cdiv(heads - first, at_once))](
        qkv, table, kv_slots, layer_kv,
        layer_kv.stride(0), heads, num_heads, layer_kv.shape[0] // 2, first, half,
        HEAD_DIM=head_dim, PAIRS=pairs, HEADS=at_once, INTERLEAVED=interleaved,
        num_warps=4, **pdl_options(index_of(qkv.device)),
    )  # fmt: skip


@triton.jit
def _rotate_and_store(
    qkv, table, kv_slots, pages, page_head_stride, heads, num_heads, kv_heads, first, half,
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Works on pairs: of rotated values as the rotation pairs them, of the rest as they lie."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    head = first + tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    turned = (pair < half) & (head < num_heads + kv_heads)
    one, two = 2 * pair, 2 * pair + 1
    if not INTERLEAVED:
        one = tl.where(pair < half, pair, one)
        two = tl.where(pair < half, pair + half, two)
    real = head < heads
    start = (token * heads + head) * HEAD_DIM
    a = tl.load(qkv + start + one, mask=real & (one < HEAD_DIM), other=0.0)
    b = tl.load(qkv + start + two, mask=real & (two < HEAD_DIM), other=0.0)
    angle = table + (token * half + pair) * 2
    rotated = pair < half
    cos = tl.load(angle, mask=rotated, other=1.0).to(tl.float32)
    sin = tl.load(angle + 1, mask=rotated, other=0.0).to(tl.float32)
    wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
    a = tl.where(turned, (wide_a * cos - wide_b * sin).to(a.dtype), a)
    b = tl.where(turned, (wide_a * sin + wide_b * cos).to(b.dtype), b)
    is_query = turned & (head < num_heads)
    tl.store(qkv + start + one, a, mask=is_query)
    tl.store(qkv + start + two, b, mask=is_query)
    slot = tl.load(kv_slots + token)
    stored = real & (head >= num_heads)
    place = (head - num_heads).to(tl.int64) * page_head_stride + slot * HEAD_DIM
    tl.store(pages + place + one, a, mask=stored & (one < HEAD_DIM))
    tl.store(pages + place + two, b, mask=stored & (two < HEAD_DIM))
