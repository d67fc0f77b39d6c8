"""Attention of rows that compute one token each, over pages, in Triton: split-KV in one kernel.

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
# Up to so many pairs of row and kv head, the time of a single one matters.
FEW_PAIRS = 16
# Pairs of (row, kv head) from which on a card is full without splits (two waves of an H100).
_FULL_PAIRS = 192
# In a full card only such a share of a long row is split off, so that it does not run on alone.
_LONG_SHARE_TOKENS = 2048


class DecodeRows(NamedTuple):
    """What the decode kernel computes: the first `num_rows` entries of `rows`, row i = token i.

    `rows` is int32 [num_rows or more, 4], `tables` int32 [num_slots, max_blocks]; `max_splits`
    bounds into how many shares a context is cut (`decode_splits`). `counters` are int32, zero
    before and after each launch, num_rows * kv_heads of them. `early`: the launch may come before
    the end of the kernel before it, which must be on the same stream.
    """

    rows: Tensor
    tables: Tensor
    num_rows: int
    max_splits: int
    counters: Tensor
    early: bool = True


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
    element_bytes: int, head_dim: int, group: int, many: bool, compute: tuple[int, int]
) -> DecodeConfig:
    """The default for a kv head of `head_dim` values that `group` query heads read.

    `many` pairs of row and kv head keep the card busy with small tiles, several blocks in each SM;
    few should each be done early, in large tiles. Measured on an H100, 2 kv heads: 1 row of 2,048
    tokens takes 8.8 us with tiles of 128 and 13 with 64, 128 rows take 94 us with tiles of 32 and
    107 with 64. Without tensor cores a padded product costs registers and up to 16 times the
    arithmetic: small tiles, not pipelined, and a single query head is multiplied and summed.
    """
    width = padded(head_dim)
    if not has_tensor_cores(element_bytes, compute):
        tile = min(max(16 * 1024 // (element_bytes * width), 16), 32)
        return DecodeConfig(tile, 4, 1, group > 1)
    wished = DecodeConfig(32, 4, 3, True) if many else DecodeConfig(128, 8, 3, True)
    if many and group == 1:
        wished = DecodeConfig(64, 4, 4, True)
    tile = max(wished.tile * 128 // max(width, 128), 16)
    room = shared_bytes(compute) * 7 // 8
    while tile > 16 and 2 * tile * width * element_bytes * wished.num_stages > room:
        tile //= 2
    return wished._replace(tile=tile)


def decode_splits(num_rows: int, kv_heads: int, max_len: int, sm_count: int) -> int:
    """`max_splits` for `num_rows` rows of up to `max_len` tokens: about two waves of programs.

    A card that is full without splits still cuts off shares of very long rows, four at most (the
    partial results of many rows take memory).
    """
    pairs = max(num_rows * kv_heads, 1)
    splits = (2 * sm_count + pairs // 2) // pairs
    if splits > 1:
        return min(splits, max((max_len + 63) // 64, 1), _MAX_SPLITS)
    return min(max(max_len // (4 * _LONG_SHARE_TOKENS), 1), 4)


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
    rows, tables, num_rows, max_splits, counters, early = work
    _, heads, head_dim = q.shape
    kv_heads, num_blocks, block_size = layer_kv.shape[0] // 2, layer_kv.shape[1], layer_kv.shape[2]
    group = heads // kv_heads
    device = index_of(q.device)
    tile, num_warps, num_stages, dot = config or decode_config(
        q.element_size(), head_dim, group, num_rows * kv_heads > FEW_PAIRS, capability(device)
    )
    partials = num_rows * heads * max_splits * (head_dim + 1) if max_splits > 1 else 1
    scratch = torch.empty(partials, dtype=torch.float32, device=q.device)
    least = 1 if num_rows * kv_heads < _FULL_PAIRS else max(_LONG_SHARE_TOKENS // tile, 1)
    _decode[(num_rows, kv_heads, max_splits)](
        q, layer_kv, rows, tables, out, scratch, counters,
        q.stride(0), tables.stride(0), num_blocks,
        score_factor(rule), rule.window, max_splits, least,
        KV_HEADS=kv_heads, GROUP=group, GROUP_PAD=padded(group) if dot else 1,
        HEAD_DIM=head_dim, DIM_PAD=padded(head_dim), BLOCK_SIZE=block_size, SOFTCAP=rule.softcap,
        TILE=tile, STAGES=num_stages, DOT=dot, CHUNK=4 if dot else 16, num_warps=num_warps,
        **pdl_options(device if early else -1),
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
    q, kv, rows, tables, out, scratch, counters,
    q_stride, table_stride, num_blocks,
    factor, window, max_splits, least,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, SOFTCAP: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr, CHUNK: tl.constexpr,
    PDL: tl.constexpr,
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
        place = (row.to(tl.int64) * heads + head) * max_splits
        sums = scratch + tl.num_programs(0).to(tl.int64) * heads * max_splits * HEAD_DIM + place
        partials = scratch + place * HEAD_DIM
        tl.store(partials[:, None] + split * HEAD_DIM + dims[None, :], result, mask=mine)
        tl.store(sums + split, total, mask=member < GROUP)
        # Who finishes last joins the shares, and leaves the counter as it was found.
        tl.debug_barrier()
        counter = counters + row * KV_HEADS + kv_head
        if tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1:
            tl.store(counter, 0)
            result = _joined(
                partials, sums, splits, member < GROUP, dims < HEAD_DIM,
                HEAD_DIM, GROUP_PAD, DIM_PAD, CHUNK,
            )  # fmt: skip
            tl.store(target, result.to(out.dtype.element_ty), mask=mine)


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


@triton.jit
def _joined(
    partials, sums, splits, mine, inside,
    HEAD_DIM: tl.constexpr, GROUP_PAD: tl.constexpr, DIM_PAD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The mean of values [GROUP_PAD, DIM_PAD] over all shares of a context.

    `partials` and `sums` point to each query head's shares, [GROUP_PAD]. Read past the L1 cache:
    other programs have written them while this one ran.
    """
    dims = tl.arange(0, DIM_PAD)
    best = tl.full([GROUP_PAD], NO_SCORE, tl.float32)
    weight = tl.zeros([GROUP_PAD], tl.float32)
    result = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
    for chunk in range(0, splits, CHUNK):
        split = chunk + tl.arange(0, CHUNK)
        there = mine[:, None] & (split < splits)[None, :]
        total = tl.load(
            sums[:, None] + split[None, :], mask=there, other=float("-inf"), cache_modifier=".cg"
        )
        part = tl.load(
            partials[:, None, None] + split[None, :, None] * HEAD_DIM + dims[None, None, :],
            mask=there[:, :, None] & inside[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        better = tl.maximum(best, tl.max(total, 1))
        fade = tl.exp2(best - better)
        share = tl.exp2(total - better[:, None])
        weight = weight * fade + tl.sum(share, 1)
        result = result * fade[:, None] + tl.sum(part * share[:, :, None], 1)
        best = better
    return result / tl.where(mine, weight, 1.0)[:, None]
