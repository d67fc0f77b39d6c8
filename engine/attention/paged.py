"""Attention of one step over pages, on a card: the Triton kernels behind the decoder's contract.

Owns nothing. Imports Triton: chosen where it is installed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine.attention.base import AttentionRule, Rotation
from engine.attention.paged_decode import DecodeRows, paged_decode
from engine.attention.paged_prefill import PrefillTiles, paged_prefill
from engine.kernels.rope import rotate_and_store


class PagedStep(NamedTuple):
    """See `engine.attention.base.StepAttention`. The step's first tokens are its decode rows.

    `kv_slots` is int64 [num_tokens]: block * block_size + offset. `rows` is int32 [num_rows or
    more, 4] of (slot, start, count, first token), count 0 is padding; `tables` int32 [num_slots,
    max_blocks]; `tiles` int32 [num_tiles or more, 2] of (row, first query counted from its start),
    row -1 is padding. `num_rows` counts the decode rows, `max_splits` is `decode_splits`' answer,
    `tile_size` the queries of a tile: `prefill_tile`'s answer or `SHORT_TILE`; `counters` are those
    of `DecodeRows`. `side`: a stream on which decoding may run beside prompts.
    """

    kv_slots: Tensor
    rows: Tensor
    tables: Tensor
    tiles: Tensor
    num_rows: int
    max_splits: int
    num_tiles: int
    tile_size: int
    counters: Tensor
    side: torch.cuda.Stream | None = None

    def store(
        self, qkv: Tensor, num_heads: int, layer_kv: Tensor, rotation: Rotation | None
    ) -> None:
        turns, interleaved = (None, False) if rotation is None else rotation
        rotate_and_store(qkv, num_heads, self.kv_slots, layer_kv, turns, interleaved)

    def attend(self, q: Tensor, layer_kv: Tensor, rule: AttentionRule) -> Tensor:
        out = torch.empty((q.shape[0], q.shape[1] * q.shape[2]), dtype=q.dtype, device=q.device)
        if self.num_rows and self.num_tiles and self.side is not None:
            # Decoding waits for memory, prompts for arithmetic: they run beside one another.
            main = torch.cuda.current_stream()
            self.side.wait_stream(main)
            with torch.cuda.stream(self.side):
                self._decode(q, layer_kv, rule, out, early=False)
            self._prefill(q, layer_kv, rule, out, early=False)
            main.wait_stream(self.side)
            return out
        if self.num_rows:
            self._decode(q, layer_kv, rule, out, early=True)
        if self.num_tiles:
            self._prefill(q, layer_kv, rule, out, early=True)
        return out

    def _decode(
        self, q: Tensor, layer_kv: Tensor, rule: AttentionRule, out: Tensor, *, early: bool
    ) -> None:
        rows = DecodeRows(
            self.rows, self.tables, self.num_rows, self.max_splits, self.counters, early
        )
        paged_decode(q, layer_kv, rows, rule, out)

    def _prefill(
        self, q: Tensor, layer_kv: Tensor, rule: AttentionRule, out: Tensor, *, early: bool
    ) -> None:
        tiles = PrefillTiles(
            self.rows, self.tables, self.tiles, self.num_tiles, self.tile_size, early
        )
        paged_prefill(q, layer_kv, tiles, rule, out)
