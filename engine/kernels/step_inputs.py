"""From a step's description to the inputs of the model, on the device. Owns nothing."""

# Triton is untyped, and kernels take what a launch passes: pointers, strides, constants.
# pyright: basic
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# ruff: noqa: PLR0913

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 128


class SlotState(NamedTuple):
    """What the card holds of all slots, and the rows of the step.

    `rows` int32 [R, 4]: slot, start, count, first token; unused ones have count 0 and as first
    token the number of the step's tokens. `tokens` int32 [slots, max_len + 1], `tables` int32
    [slots, max_blocks] of blocks of `block_size`.
    """

    rows: Tensor
    tokens: Tensor
    tables: Tensor
    block_size: int


def prepare_inputs(
    state: SlotState, pad_kv_slot: int, ids: Tensor, positions: Tensor, kv_slots: Tensor
) -> None:
    """Fills int64 [n] `ids`, `positions` and `kv_slots` (block * block_size + offset).

    Tokens beyond those of the rows are padding: id 0, position 0, `pad_kv_slot`.
    """
    rows, tokens, tables, block_size = state
    _prepare_inputs[(triton.cdiv(len(ids), _BLOCK),)](
        rows, tokens, tables, ids, positions, kv_slots,
        len(rows), len(ids), tokens.stride(0), tables.stride(0), block_size, pad_kv_slot,
        SEARCHES=len(rows).bit_length(), BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def apply_grows(grows: Tensor, count: int, tables: Tensor) -> None:
    """tables[slot, at] = block for the first `count` of int32 [n, 3] `grows`: slot, at, block."""
    _apply_grows[(triton.cdiv(count, _BLOCK),)](
        grows, tables, count, tables.stride(0), BLOCK=_BLOCK, num_warps=4
    )


@triton.jit(do_not_specialize=["num_tokens", "pad_kv_slot"])
def _prepare_inputs(
    rows, tokens, tables, ids, positions, kv_slots,
    num_rows, num_tokens, tokens_stride, tables_stride, block_size, pad_kv_slot,
    SEARCHES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < num_tokens
    # The last row whose first token is not behind this one: first tokens rise over used rows.
    low = tl.zeros([BLOCK], tl.int32)
    high = low + num_rows
    for _ in range(SEARCHES):
        middle = (low + high) // 2
        first = tl.load(rows + middle * 4 + 3, mask=middle < num_rows, other=0x7FFFFFFF)
        before = (first <= token) & (middle < high)
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    slot = tl.load(rows + low * 4).to(tl.int64)
    start = tl.load(rows + low * 4 + 1)
    count = tl.load(rows + low * 4 + 2)
    first = tl.load(rows + low * 4 + 3)
    real = inside & (token >= first) & (token < first + count)
    position = tl.where(real, start + token - first, 0)
    token_id = tl.load(tokens + slot * tokens_stride + position, mask=real, other=0)
    block = tl.load(tables + slot * tables_stride + position // block_size, mask=real, other=0)
    kv_slot = block.to(tl.int64) * block_size + position % block_size
    tl.store(ids + token, token_id.to(tl.int64), mask=inside)
    tl.store(positions + token, position.to(tl.int64), mask=inside)
    tl.store(kv_slots + token, tl.where(real, kv_slot, pad_kv_slot), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _apply_grows(grows, tables, count, tables_stride, BLOCK: tl.constexpr):
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(grows + number * 3, mask=number < count, other=-1)
    at = tl.load(grows + number * 3 + 1, mask=number < count, other=0)
    block = tl.load(grows + number * 3 + 2, mask=number < count, other=0)
    tl.store(tables + slot.to(tl.int64) * tables_stride + at, block, mask=slot >= 0)
