"""Sizes of a GPU step, and the few sizes that graphs are captured for. Pure; no torch.

A captured graph does the same work whatever is in its buffers, so a step runs in the smallest one
that holds it and the rest is padding.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

# Prompts up to here run as one captured graph when nothing decodes beside them. Longer ones, and
# mixed steps, take the card longer than the host needs to launch them one kernel at a time.
_PROMPT_BUCKETS = (16, 32, 64, 128, 256, 512)
_SPARE_TILES = 4
# Chunks up to here are cut into short tiles: there is more to gain from more programs.
_SHORT_CHUNK = 64
SHORT_TILE = 16


class StepShape(NamedTuple):
    """What the kernels of one step are launched for.

    `tokens` are computed in all; the first `decode_rows` of them are one each of as many sequences;
    the others are cut into `tiles` of up to `tile` queries for prefill attention.
    """

    tokens: int
    decode_rows: int
    tiles: int
    tile: int


def decode_buckets(max_batch: int) -> tuple[int, ...]:
    """Numbers of rows that decode graphs are captured for, rising, up to `max_batch`."""
    sizes = [1, 2, 4, *range(8, 128, 8), *range(128, max_batch, 16)]
    return (*(size for size in sizes if size < max_batch), max_batch)


def tile_of(longest_chunk: int, long_tile: int) -> int:
    """Queries of a tile in a step whose longest chunk has so many."""
    return min(SHORT_TILE, long_tile) if longest_chunk <= _SHORT_CHUNK else long_tile


def captured_shape(exact: StepShape, decode: tuple[int, ...]) -> StepShape | None:
    """The captured shape that an exact one is padded to; None if it is to be launched as it is.

    `decode` are the engine's decode buckets.
    """
    if exact.decode_rows == exact.tokens:
        if exact.tokens > decode[-1]:
            return None
        rows = decode[bisect_left(decode, exact.tokens)]
        return StepShape(rows, rows, 0, exact.tile)
    if exact.decode_rows or exact.tokens > _PROMPT_BUCKETS[-1]:
        return None
    tokens = _PROMPT_BUCKETS[bisect_left(_PROMPT_BUCKETS, exact.tokens)]
    tiles = -(-tokens // exact.tile) + _SPARE_TILES
    return None if exact.tiles > tiles else StepShape(tokens, 0, tiles, exact.tile)


def first_shapes(decode: tuple[int, ...], long_tile: int) -> list[StepShape]:
    """Shapes to be captured while nothing else is to be done: the likeliest first."""

    def prompt(tokens: int) -> StepShape:
        tile = tile_of(tokens, long_tile)
        return StepShape(tokens, 0, -(-tokens // tile) + _SPARE_TILES, tile)

    rows = [StepShape(size, size, 0, tile_of(1, long_tile)) for size in decode]
    return [*rows[:4], *map(prompt, _PROMPT_BUCKETS), *rows[4:]]
