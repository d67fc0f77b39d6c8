"""Attention of rows that compute one token each, over pages, in Triton: split-KV with a combine.

Owns nothing. One program reads one share of one row's context for one kv head and all query heads
that read it, so that keys and values come from memory once. How a row is shared out is computed on
the device from its length: a CUDA graph holds the grid only. Sources: online softmax (arXiv
1805.02867), split-KV as in Flash-Decoding (Dao et al., 2023), GQA packing and a static grid as in
"The Anatomy of a Triton Attention Kernel" (arXiv 2511.11581).
"""

# Triton is untyped, and kernels take what a launch passes: pointers, strides, constants.
# pyright: basic, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, import-untyped"
# ruff: noqa: PLR0913

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.attention.base import AttentionRule
from engine.kernels.launch import capability, index_of, pdl_options

LOG2_E = 1.4426950408889634
# Below any score, and finite: the difference of two of them is no NaN.
NO_SCORE = tl.constexpr(-1.0e30)

_MAX_SPLITS = 128
# Pairs of (row, kv head) from which on a card is full without splits (two waves of an H100).
_FULL_PAIRS = 192
# In a full card only such a share of a long row is split off, so that it does not run on alone.
_LONG_SHARE_TOKENS = 2048
_COMBINED_AT_ONCE = 16


class DecodeRows(NamedTuple):
    """What the decode kernel computes: the first `num_rows` entries of `rows`, row i = token i.

    `rows` is int32 [num_rows or more, 4], `tables` int32 [num_slots, max_blocks]; `max_splits`
    bounds into how many shares a context is cut (`decode_splits`).
    """

    rows: Tensor
    tables: Tensor
    num_rows: int
    max_splits: int


class DecodeConfig(NamedTuple):
    """Shape of one program: tokens of a tile, warps, tiles under way at once.

    `dot` multiplies with tensor cores (the query heads padded to 16 rows); without it a group of
    one query head is multiplied and summed in float32.
    """

    tile: int
    num_warps: int
    num_stages: int
    dot: bool


def shared_bytes(compute: tuple[int, int]) -> int:
    """Shared memory that one block may use, from CUDA's table of compute capabilities."""
    known = {(7, 5): 64, (8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
    return known.get(compute, 99) * 1024


def has_tensor_cores(element_bytes: int, compute: tuple[int, int]) -> bool:
    """Triton multiplies such tensors on tensor cores: half types, from sm80 on (not on sm75)."""
    return element_bytes == 2 and compute >= (8, 0)


@cache
def decode_config(
    element_bytes: int, head_dim: int, group: int, compute: tuple[int, int]
) -> DecodeConfig:
    """The default for a kv head of `head_dim` values that `group` query heads read.

    A tile of keys is 16 KB: wide loads, and of 3 stages two tiles of keys and values are under way
    in each of 3 blocks of an H100's SM, which hides the latency of memory. Without tensor cores a
    padded product costs registers and up to 16 times the arithmetic: small tiles, not pipelined,
    and a single query head is multiplied and summed.
    """
    width = padded(head_dim)
    tile = min(max(16 * 1024 // (element_bytes * width), 16), 128)
    if has_tensor_cores(element_bytes, compute):
        return DecodeConfig(tile, 4, 3 if shared_bytes(compute) > 128 * 1024 else 2, True)
    return DecodeConfig(min(tile, 32), 4, 1, group > 1)


def decode_splits(num_rows: int, kv_heads: int, max_len: int, sm_count: int) -> int:
    """`max_splits` for `num_rows` rows of up to `max_len` tokens: about two waves of programs.

    A card that is full without splits still cuts off shares of very long rows, eight at most (the
    partial results of many rows take memory).
    """
    pairs = max(num_rows * kv_heads, 1)
    splits = (2 * sm_count + pairs // 2) // pairs
    if splits > 1:
        return min(splits, max((max_len + 63) // 64, 1), _MAX_SPLITS)
    return min(max(max_len // (2 * _LONG_SHARE_TOKENS), 1), 8)


def paged_decode(
    q: Tensor,
    layer_kv: Tensor,
    work: DecodeRows,
    rule: AttentionRule,
    out: Tensor,
    config: DecodeConfig | None = None,
) -> None:
    """Writes [row, num_heads * head_dim] of `out` for each decode row, nothing for other rows.

    `q` is [num_tokens, num_heads, head_dim] with any stride between tokens, `layer_kv`
    [2 * kv_heads, num_blocks, block_size, head_dim]; keys of the rows' own tokens are stored.
    """
    rows, tables, num_rows, max_splits = work
    _, heads, head_dim = q.shape
    kv_heads, num_blocks, block_size = layer_kv.shape[0] // 2, layer_kv.shape[1], layer_kv.shape[2]
    group = heads // kv_heads
    device = index_of(q.device)
    tile, num_warps, num_stages, dot = config or decode_config(
        q.element_size(), head_dim, group, capability(device)
    )
    pdl = pdl_options(device)
    partials = num_rows * heads * max_splits * (head_dim + 1) if max_splits > 1 else 1
    scratch = torch.empty(partials, dtype=torch.float32, device=q.device)
    least = 1 if num_rows * kv_heads < _FULL_PAIRS else max(_LONG_SHARE_TOKENS // tile, 1)
    _decode[(num_rows, kv_heads, max_splits)](
        q, layer_kv, rows, tables, out, scratch,
        q.stride(0), tables.stride(0), num_blocks,
        score_factor(rule), rule.window, max_splits, least,
        KV_HEADS=kv_heads, GROUP=group, GROUP_PAD=padded(group) if dot else 1,
        HEAD_DIM=head_dim, DIM_PAD=padded(head_dim), BLOCK_SIZE=block_size, SOFTCAP=rule.softcap,
        TILE=tile, STAGES=num_stages, DOT=dot, num_warps=num_warps, **pdl,
    )  # fmt: skip
    if max_splits > 1:
        _combine[(num_rows, heads)](
            rows, out, scratch, rule.window, max_splits, least,
            HEAD_DIM=head_dim, DIM_PAD=padded(head_dim), TILE=tile, CHUNK=_COMBINED_AT_ONCE,
            num_warps=4, **pdl,
        )  # fmt: skip


def padded(size: int) -> int:
    """The size of a tile that holds `size`: a power of two and at least 16, as `tl.dot` asks."""
    return max(1 << (size - 1).bit_length(), 16)


def score_factor(rule: AttentionRule) -> float:
    """What the kernels multiply raw scores with: base 2, or the argument of `capped_scores`."""
    return rule.scale * LOG2_E * (2.0 / rule.softcap if rule.softcap else 1.0)


@triton.jit
def capped_scores(doubled, SOFTCAP: tl.constexpr):
    """softcap * tanh(s / softcap) in base 2, of 2 * log2(e) * s / softcap."""
    return (SOFTCAP * 1.4426950408889634) * (1.0 - 2.0 / (tl.exp2(doubled) + 1.0))


@triton.jit
def block_of(table, tile, last, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Block number of each position of a tile, or the one of all; none behind entry `last`."""
    if TILE < BLOCK_SIZE:
        entry = tile // (BLOCK_SIZE // TILE)
    else:
        entry = tile * (TILE // BLOCK_SIZE) + tl.arange(0, TILE) // BLOCK_SIZE
    return tl.load(table + tl.minimum(entry, last))


@triton.jit
def offsets_of(
    block, tile, HEAD_DIM: tl.constexpr, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr
):  # fmt: skip
    """Where the keys of a tile's positions begin within their head, int64 [TILE]."""
    place = tl.arange(0, TILE) % BLOCK_SIZE
    if TILE < BLOCK_SIZE:
        place += tile % (BLOCK_SIZE // TILE) * TILE
    return block.to(tl.int64) * (BLOCK_SIZE * HEAD_DIM) + place * HEAD_DIM


@triton.jit
def load_heads(heads, at, there, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr):
    """[TILE, DIM_PAD] of keys or values at offsets `at`; 0 where not `there` (None: everywhere).

    Values of positions not written yet may be NaN, which a weight of 0 would not hide.
    """
    dims = tl.arange(0, DIM_PAD)
    pointers = heads + at[:, None] + dims[None, :]
    inside = (dims < HEAD_DIM)[None, :]
    if there is not None:
        return tl.load(pointers, mask=there[:, None] & inside, other=0.0)
    elif HEAD_DIM < DIM_PAD:
        return tl.load(pointers, mask=inside, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _shares(length, window, max_splits, least, TILE: tl.constexpr):
    """(first visible position, its tile, tiles in all, tiles of one share, shares) of a context."""
    low = tl.where(window > 0, tl.maximum(length - window, 0), 0)
    first = low // TILE
    tiles = tl.cdiv(length, TILE)
    share = tl.maximum(tl.cdiv(tiles - first, max_splits), least)
    return low, first, tiles, share, tl.cdiv(tiles - first, share)


@triton.jit(do_not_specialize=["window", "max_splits", "least"])
def _decode(
    q, kv, rows, tables, out, scratch,
    q_stride, table_stride, num_blocks,
    factor, window, max_splits, least,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, SOFTCAP: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot, start, count = (
        tl.load(rows + row * 4),
        tl.load(rows + row * 4 + 1),
        tl.load(rows + row * 4 + 2),
    )
    member = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, DIM_PAD)
    head = kv_head * GROUP + member
    mine = (member < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    heads = KV_HEADS * GROUP
    target = out + (row.to(tl.int64) * heads + head)[:, None] * HEAD_DIM + dims[None, :]
    if count != 1:  # padding, or in a padded grid a chunk: its tokens belong to the prefill kernel
        return
    low, first, tiles, share, splits = _shares(start + count, window, max_splits, least, TILE)
    if split >= splits:
        return
    table = tables + slot.to(tl.int64) * table_stride
    head_stride = num_blocks.to(tl.int64) * (BLOCK_SIZE * HEAD_DIM)
    keys = kv + kv_head * head_stride
    values = keys + KV_HEADS * head_stride
    begin = first + split * share
    end = tl.minimum(begin + share, tiles)
    queries = q + row.to(tl.int64) * q_stride + head[:, None] * HEAD_DIM + dims[None, :]
    if DOT:
        query = tl.load(queries, mask=mine, other=0.0)
        total, result = _by_dot(
            query, keys, values, table, begin, end, low, start + count, factor,
            HEAD_DIM, BLOCK_SIZE, SOFTCAP, TILE, STAGES,
        )  # fmt: skip
    else:
        query = tl.load(queries, mask=mine, other=0.0).to(tl.float32)
        total, result = _by_sum(
            query, keys, values, table, begin, end, low, start + count, factor,
            HEAD_DIM, BLOCK_SIZE, SOFTCAP, TILE, STAGES,
        )  # fmt: skip
    if splits == 1:
        tl.store(target, result.to(out.dtype.element_ty), mask=mine)
    else:
        place = (row.to(tl.int64) * heads + head) * max_splits + split
        tl.store(scratch + place[:, None] * HEAD_DIM + dims[None, :], result, mask=mine)
        sums = scratch + tl.num_programs(0).to(tl.int64) * heads * max_splits * HEAD_DIM
        tl.store(sums + place, total, mask=member < GROUP)


@triton.jit
def _by_dot(
    query, keys, values, table, begin, end, low, length, factor,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, SOFTCAP: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(log2 of the sum of weights [GROUP_PAD], mean of values [GROUP_PAD, DIM_PAD]) of tiles."""
    best = tl.full([query.shape[0]], NO_SCORE, tl.float32)
    weight = tl.zeros([query.shape[0]], tl.float32)
    result = tl.zeros([query.shape[0], query.shape[1]], tl.float32)
    last = (length - 1) // BLOCK_SIZE
    block = block_of(table, begin, last, TILE, BLOCK_SIZE)
    for tile in tl.range(begin, end, num_stages=STAGES):
        position = tile * TILE + tl.arange(0, TILE)
        at = offsets_of(block, tile, HEAD_DIM, TILE, BLOCK_SIZE)
        key = load_heads(keys, at, None, HEAD_DIM, query.shape[1])
        value = load_heads(values, at, position < length, HEAD_DIM, query.shape[1])
        # Looked up one tile ahead: within one tile it would hold back the loads of the pipeline.
        block = block_of(table, tile + 1, last, TILE, BLOCK_SIZE)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * factor
        if SOFTCAP > 0:
            score = capped_scores(score, SOFTCAP)
        seen = (position >= low) & (position < length)
        score = tl.where(seen[None, :], score, float("-inf"))
        better = tl.maximum(best, tl.max(score, 1))
        fade = tl.exp2(best - better)
        part = tl.exp2(score - better[:, None])
        weight = weight * fade + tl.sum(part, 1)
        result = tl.dot(
            part.to(value.dtype), value, acc=result * fade[:, None], input_precision="ieee"
        )
        best = better
    return best + tl.log2(weight), result / weight[:, None]


@triton.jit
def _by_sum(
    query, keys, values, table, begin, end, low, length, factor,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, SOFTCAP: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `_by_dot`, of one query [1, DIM_PAD]. Each lane of the tile has a softmax of its own.

    So nothing crosses warps before the end.
    """
    best = tl.full([TILE], NO_SCORE, tl.float32)
    weight = tl.zeros([TILE], tl.float32)
    result = tl.zeros([TILE, query.shape[1]], tl.float32)
    last = (length - 1) // BLOCK_SIZE
    block = block_of(table, begin, last, TILE, BLOCK_SIZE)
    for tile in tl.range(begin, end, num_stages=STAGES):
        position = tile * TILE + tl.arange(0, TILE)
        at = offsets_of(block, tile, HEAD_DIM, TILE, BLOCK_SIZE)
        key = load_heads(keys, at, None, HEAD_DIM, query.shape[1])
        value = load_heads(values, at, position < length, HEAD_DIM, query.shape[1])
        block = block_of(table, tile + 1, last, TILE, BLOCK_SIZE)
        score = tl.sum(key.to(tl.float32) * query, 1) * factor
        if SOFTCAP > 0:
            score = capped_scores(score, SOFTCAP)
        score = tl.where((position >= low) & (position < length), score, float("-inf"))
        better = tl.maximum(best, score)
        fade = tl.exp2(best - better)
        part = tl.exp2(score - better)
        weight = weight * fade + part
        result = result * fade[:, None] + part[:, None] * value.to(tl.float32)
        best = better
    top = tl.max(best, 0)
    fade = tl.exp2(best - top)
    total = tl.sum(weight * fade, 0)
    mean = tl.sum(result * fade[:, None], 0) / total
    return tl.zeros([1], tl.float32) + (top + tl.log2(total)), mean[None, :]


@triton.jit(do_not_specialize=["window", "max_splits", "least"])
def _combine(
    rows, out, scratch, window, max_splits, least,
    HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Weighs the shares of one row and query head, those that exist, CHUNK at a time."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, head = tl.program_id(0), tl.program_id(1)
    start, count = tl.load(rows + row * 4 + 1), tl.load(rows + row * 4 + 2)
    _, _, _, _, splits = _shares(start + count, window, max_splits, least, TILE)
    if (count != 1) | (splits == 1):
        return
    dims = tl.arange(0, DIM_PAD)
    inside = dims < HEAD_DIM
    heads = tl.num_programs(1)
    place = (row.to(tl.int64) * heads + head) * max_splits
    partials = scratch + place * HEAD_DIM
    sums = scratch + tl.num_programs(0).to(tl.int64) * heads * max_splits * HEAD_DIM + place
    best = tl.full([], NO_SCORE, tl.float32)
    weight = tl.zeros([], tl.float32)
    result = tl.zeros([DIM_PAD], tl.float32)
    for chunk in range(0, splits, CHUNK):
        split = chunk + tl.arange(0, CHUNK)
        there = split < splits
        total = tl.load(sums + split, mask=there, other=float("-inf"))
        part = tl.load(
            partials + split[:, None] * HEAD_DIM + dims[None, :],
            mask=there[:, None] & inside[None, :],
            other=0.0,
        )
        better = tl.maximum(best, tl.max(total, 0))
        fade = tl.exp2(best - better)
        share = tl.exp2(total - better)
        weight = weight * fade + tl.sum(share, 0)
        result = result * fade + tl.sum(part * share[:, None], 0)
        best = better
    target = out + (row.to(tl.int64) * heads + head) * HEAD_DIM + dims
    tl.store(target, (result / weight).to(out.dtype.element_ty), mask=inside)
