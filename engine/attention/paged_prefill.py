"""Causal attention of prompt chunks over pages, in Triton.

Owns nothing. One program computes a tile of queries of one head; keys and values of the chunk
itself lie in the pages already. Which tiles there are is data on the device: a CUDA graph holds
their number only. Sources: FlashAttention-2 (arXiv 2307.08691), online softmax in base 2; masks
only in tiles that the diagonal or the window's edge crosses.
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
from engine.attention.paged_decode import (
    NO_SCORE,
    block_of,
    capped_scores,
    has_tensor_cores,
    load_heads,
    offsets_of,
    padded,
    score_factor,
    shared_bytes,
)
from engine.kernels.launch import capability, index_of, pdl_options

# For steps whose chunks are all this short, as behind a prefix hit: a large tile is mostly padding.
SHORT_TILE = 16


class PrefillTiles(NamedTuple):
    """What the prefill kernel computes: the first `num_tiles` of `tiles`, `size` queries each.

    `rows` is int32 [num_rows, 4], `tables` int32 [num_slots, max_blocks], `tiles` int32
    [num_tiles or more, 2]: a row, and the first query of the tile counted from the row's start;
    row -1 is padding. Later entries start first: within a chunk they are the longer ones. `early`
    as in `DecodeRows`.
    """

    rows: Tensor
    tables: Tensor
    tiles: Tensor
    num_tiles: int
    size: int
    early: bool = True


class PrefillConfig(NamedTuple):
    """Shape of one program: keys of a tile, warps, tiles of keys and values under way at once."""

    tile: int
    num_warps: int
    num_stages: int


def prefill_tile(head_dim: int, dtype: torch.dtype, compute: tuple[int, int]) -> int:
    """Queries of a tile. The larger, the less often keys are read; bounded by registers.

    128 on tensor cores, else 32; half of it for heads beyond 128.
    """
    wide = padded(head_dim) > 128
    if has_tensor_cores(dtype.itemsize, compute):
        return 64 if wide else 128
    return 16 if wide else 32


@cache
def prefill_config(
    element_bytes: int, head_dim: int, queries: int, compute: tuple[int, int]
) -> PrefillConfig:
    """The default for tiles of `queries`: the largest tile of keys whose stages fit beside them.

    A tile of 64 keys keeps scores and result of 128 queries in the registers of 8 warps; more
    spill, and spills make Hopper's products wait for one another.
    """
    row_bytes = padded(head_dim) * element_bytes
    if not has_tensor_cores(element_bytes, compute):
        return PrefillConfig(16 if padded(head_dim) > 128 else 32, 4, 1)
    stages = 3 if shared_bytes(compute) > 128 * 1024 else 2
    # An eighth stays free for what Triton needs to change layouts.
    room = shared_bytes(compute) * 7 // 8 - queries * row_bytes
    tile = 64
    while tile > 16 and 2 * tile * row_bytes * stages > room:
        tile //= 2
    return PrefillConfig(tile, 8 if queries >= 128 else 4, stages)


def paged_prefill(
    q: Tensor,
    layer_kv: Tensor,
    work: PrefillTiles,
    rule: AttentionRule,
    out: Tensor,
    config: PrefillConfig | None = None,
) -> None:
    """Writes [token, num_heads * head_dim] of `out` for the queries of all tiles, nothing else.

    `q` is [num_tokens, num_heads, head_dim] with any stride between tokens, `layer_kv`
    [2 * kv_heads, num_blocks, block_size, head_dim].
    """
    rows, tables, tiles, num_tiles, size, early = work
    _, heads, head_dim = q.shape
    kv_heads, num_blocks, block_size = layer_kv.shape[0] // 2, layer_kv.shape[1], layer_kv.shape[2]
    device = index_of(q.device)
    tile, num_warps, num_stages = config or prefill_config(
        q.element_size(), head_dim, size, capability(device)
    )
    _prefill[(heads, num_tiles)](
        q, layer_kv, rows, tables, tiles, out,
        q.stride(0), tables.stride(0), num_blocks, score_factor(rule), rule.window,
        KV_HEADS=kv_heads, GROUP=heads // kv_heads,
        HEAD_DIM=head_dim, DIM_PAD=padded(head_dim), BLOCK_SIZE=block_size, SOFTCAP=rule.softcap,
        QUERIES=size, TILE=tile, STAGES=num_stages, num_warps=num_warps,
        **pdl_options(device if early else -1),
    )  # fmt: skip


@triton.jit(do_not_specialize=["window"])
def _prefill(
    q, kv, rows, tables, tiles, out,
    q_stride, table_stride, num_blocks, factor, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SOFTCAP: tl.constexpr, QUERIES: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0)
    number = tl.num_programs(1) - 1 - tl.program_id(1)
    row, first = tl.load(tiles + number * 2), tl.load(tiles + number * 2 + 1)
    if row < 0:
        return
    slot, start = tl.load(rows + row * 4), tl.load(rows + row * 4 + 1)
    count, first_token = tl.load(rows + row * 4 + 2), tl.load(rows + row * 4 + 3)
    if first >= count:
        return
    dims = tl.arange(0, DIM_PAD)
    member = first + tl.arange(0, QUERIES)
    mine = (member < count)[:, None] & (dims < HEAD_DIM)[None, :]
    token = (first_token + member).to(tl.int64)[:, None]
    query = tl.load(q + token * q_stride + head * HEAD_DIM + dims[None, :], mask=mine, other=0.0)
    table = tables + slot.to(tl.int64) * table_stride
    head_stride = num_blocks.to(tl.int64) * (BLOCK_SIZE * HEAD_DIM)
    keys = kv + (head // GROUP) * head_stride
    values = keys + KV_HEADS * head_stride

    lowest, highest = start + first, start + tl.minimum(first + QUERIES, count) - 1
    reach = tl.where(window > 0, window, highest + 1)
    begin, whole, whole_end, end = _key_tiles(lowest, highest, reach, TILE)
    best, weight = tl.full([QUERIES], NO_SCORE, tl.float32), tl.zeros([QUERIES], tl.float32)
    result = tl.zeros([QUERIES, DIM_PAD], tl.float32)
    last = highest // BLOCK_SIZE
    block = block_of(table, whole, last, TILE, BLOCK_SIZE)
    for tile in tl.range(whole, whole_end, num_stages=STAGES):
        at = offsets_of(block, tile, HEAD_DIM, TILE, BLOCK_SIZE)
        # Looked up one tile ahead: within one tile it would hold back the loads of the pipeline.
        block = block_of(table, tile + 1, last, TILE, BLOCK_SIZE)
        best, weight, result = _attend(
            query, keys, values, at, None, None, best, weight, result, factor, HEAD_DIM, SOFTCAP
        )
    # Queries of the tile beyond the row see what its last one sees: no division by 0.
    position = (start + tl.minimum(member, count - 1))[:, None]
    left = whole - begin
    tile = tl.where(left > 0, begin, whole_end)
    block = block_of(table, tile, last, TILE, BLOCK_SIZE)
    for number in tl.range(0, left + end - whole_end, num_stages=STAGES):
        place = tile * TILE + tl.arange(0, TILE)
        at = offsets_of(block, tile, HEAD_DIM, TILE, BLOCK_SIZE)
        ahead = position - place[None, :]
        tile += tl.where(number + 1 == left, whole_end - whole + 1, 1)
        block = block_of(table, tile, last, TILE, BLOCK_SIZE)
        best, weight, result = _attend(
            query, keys, values, at, place <= highest, (ahead >= 0) & (ahead < reach),
            best, weight, result, factor, HEAD_DIM, SOFTCAP,
        )  # fmt: skip
    target = out + token * (KV_HEADS * GROUP * HEAD_DIM) + head * HEAD_DIM + dims[None, :]
    tl.store(target, (result / weight[:, None]).to(out.dtype.element_ty), mask=mine)


@triton.jit
def _key_tiles(lowest, highest, reach, TILE: tl.constexpr):
    """Tiles that queries at positions lowest..highest see: those of [begin, end).

    [whole, whole_end) of them need no mask: each query sees each key.
    """
    begin = tl.maximum(lowest - reach + 1, 0) // TILE
    end = highest // TILE + 1
    whole = tl.minimum(tl.cdiv(tl.maximum(highest - reach + 1, 0), TILE), end)
    return begin, whole, tl.maximum((lowest + 1) // TILE, whole), end


@triton.jit
def _attend(
    query, keys, values, at, there, seen, best, weight, result, factor,
    HEAD_DIM: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One tile of keys, offsets `at`: (best score, weights, weighted values) so far.

    `there` is bool [TILE] and `seen` bool [QUERIES, TILE]; None where each query sees each key.
    """
    key = load_heads(keys, at, None, HEAD_DIM, query.shape[1])
    value = load_heads(values, at, there, HEAD_DIM, query.shape[1])
    score = tl.dot(query, tl.trans(key), input_precision="ieee")
    if SOFTCAP > 0:
        score = capped_scores(score * factor, SOFTCAP)
    if seen is not None:
        score = tl.where(seen, score, float("-inf"))
    if SOFTCAP > 0:
        better = tl.maximum(best, tl.max(score, 1))
        part = tl.exp2(score - better[:, None])
    else:
        # The factor is applied here: a multiply-add with the subtraction.
        better = tl.maximum(best, tl.max(score, 1) * factor)
        part = tl.exp2(score * factor - better[:, None])
    fade = tl.exp2(best - better)
    weight = weight * fade + tl.sum(part, 1)
    result = tl.dot(part.to(value.dtype), value, acc=result * fade[:, None], input_precision="ieee")
    return better, weight, result
