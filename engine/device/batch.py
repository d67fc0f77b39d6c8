"""The persistent batch: per-slot device state, and the inputs of each step built from it.

Owns token rows, block tables and sampling parameters of all slots. A sampled token is written into
its slot's row on the device, so the next step can use it before the host has seen it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.attention.base import StepAttention
from engine.attention.reference import Chunk, DecodeGroup, ReferenceStep
from engine.device.sampling import SlotSampling
from engine.plan import Row, StepPlan

# Rows whose contexts differ by less than this factor share one padded gather.
_GROUP_FACTOR = 2


class StepInputs(NamedTuple):
    """Device inputs of one forward pass, tokens ordered: decode rows by context, then chunks.

    `ids`, `positions`: int64 [num_tokens]. `last[i]` is the index in the step's tokens of the last
    token of plan row i.
    """

    ids: Tensor
    positions: Tensor
    attention: StepAttention
    last: list[int]


class Batch:
    """Device state of `max_batch` slots."""

    def __init__(
        self,
        max_batch: int,
        max_len: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
        windows: Sequence[int] = (0,),
    ) -> None:
        """`windows` are those of the model's layers, 0 for full attention."""
        self._windows = tuple(windows)
        self._block_size = block_size
        self._dtype = dtype
        self._device = device
        max_blocks = -(-max_len // block_size)
        self.tokens = torch.zeros((max_batch, max_len + 1), dtype=torch.int64, device=device)
        self._tables = torch.zeros((max_batch, max_blocks), dtype=torch.int64, device=device)
        self.sampling: list[SlotSampling | None] = [None] * max_batch

    def apply(self, plan: StepPlan) -> None:
        """Takes over the plan's new sequences and blocks."""
        for admit in plan.admits:
            known = torch.tensor(admit.tokens, dtype=torch.int64)
            self.tokens[admit.slot, : len(admit.tokens)] = known.to(self._device)
            self._set_blocks(admit.slot, 0, admit.blocks)
            self.sampling[admit.slot] = SlotSampling.of(admit, self._device)
        for slot, at, blocks in plan.grows:
            self._set_blocks(slot, at, blocks)

    def _set_blocks(self, slot: int, at: int, blocks: list[int]) -> None:
        if blocks:
            row = torch.tensor(blocks, dtype=torch.int64)
            self._tables[slot, at : at + len(blocks)] = row.to(self._device)

    def inputs(self, rows: list[Row]) -> StepInputs:
        """Builds the step's inputs. Rows of one token are batched as decode rows."""
        singles = sorted(
            (i for i, row in enumerate(rows) if row.count == 1), key=lambda i: rows[i].start
        )
        chunks = [i for i, row in enumerate(rows) if row.count > 1]
        last = [0] * len(rows)
        ids: list[Tensor] = []
        positions: list[Tensor] = []
        slots: list[Tensor] = []
        if singles:
            for index, i in enumerate(singles):
                last[i] = index
            where = torch.tensor(
                [(rows[i].slot, rows[i].start) for i in singles], device=self._device
            )
            row_slots, starts = where[:, 0], where[:, 1]
            ids.append(self.tokens[row_slots, starts])
            positions.append(starts)
            slots.append(
                self._kv_slots(self._tables[row_slots, starts // self._block_size], starts)
            )
        groups = self._groups([rows[i] for i in singles])
        at = len(singles)
        parts: list[Chunk] = []
        for i in chunks:
            slot, start, count = rows[i].slot, rows[i].start, rows[i].count
            span = torch.arange(start, start + count, device=self._device)
            ids.append(self.tokens[slot, start : start + count])
            positions.append(span)
            slots.append(self._kv_slots(self._tables[slot, span // self._block_size], span))
            parts.append(self._chunk(rows[i], at))
            at += count
            last[i] = at - 1
        attention = ReferenceStep(_join(slots), groups, parts)
        return StepInputs(_join(ids), _join(positions), attention, last)

    def _kv_slots(self, blocks: Tensor, positions: Tensor) -> Tensor:
        return blocks * self._block_size + positions % self._block_size

    def _groups(self, rows: list[Row]) -> list[DecodeGroup]:
        """Splits rows, sorted by context, where the context has grown by the group factor."""
        groups: list[DecodeGroup] = []
        begin = 0
        while begin < len(rows):
            widest = max(_GROUP_FACTOR * (rows[begin].start + 1), 8 * self._block_size)
            end = begin + 1
            while end < len(rows) and rows[end].start + 1 <= widest:
                end += 1
            groups.append(self._group(rows[begin:end], begin))
            begin = end
        return groups

    def _group(self, rows: list[Row], begin: int) -> DecodeGroup:
        longest = rows[-1].start + 1
        num_blocks = -(-longest // self._block_size)
        slots = torch.tensor([row.slot for row in rows], device=self._device)
        lengths = torch.tensor([row.start + 1 for row in rows], device=self._device)
        blocks = self._tables[slots, :num_blocks]
        # A lone row that sees all of its positions needs no mask, and no whole blocks either.
        if len(rows) == 1 and all(window == 0 or window >= longest for window in self._windows):
            unmasked = dict.fromkeys(self._windows)
            return DecodeGroup(begin, begin + 1, longest, blocks.flatten(), unmasked)
        width = num_blocks * self._block_size
        # Entries beyond a row's own blocks may be stale: any valid block does, the mask hides it.
        used = torch.arange(num_blocks, device=self._device) * self._block_size < lengths[:, None]
        blocks = torch.where(used, blocks, blocks[:, :1])
        columns = torch.arange(width, device=self._device)
        masks = self._masks(columns, lengths[:, None] - 1, longest)
        masks = {window: mask[:, None] for window, mask in masks.items()}
        return DecodeGroup(begin, begin + len(rows), width, blocks.flatten(), masks)

    def _chunk(self, row: Row, begin: int) -> Chunk:
        end = row.start + row.count
        blocks = self._tables[row.slot, : -(-end // self._block_size)]
        masks: dict[int, Tensor | None] = dict.fromkeys(self._windows)
        if row.start or any(0 < window < end for window in self._windows):
            columns = torch.arange(end, device=self._device)
            positions = torch.arange(row.start, end, device=self._device)
            masks.update(self._masks(columns, positions[:, None], end))
        return Chunk(begin, begin + row.count, row.start, blocks, masks)

    def _masks(self, columns: Tensor, positions: Tensor, longest: int) -> dict[int, Tensor]:
        """0 where a query at `positions` [n, 1] sees `columns` [m], else -inf; for each window."""
        causal = columns <= positions
        whole = _additive(causal, self._dtype)
        return {
            window: _additive(causal & (columns > positions - window), self._dtype)
            if 0 < window < longest
            else whole
            for window in self._windows
        }


def _additive(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where valid, -inf elsewhere."""
    return torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill_(
        ~valid, float("-inf")
    )


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
